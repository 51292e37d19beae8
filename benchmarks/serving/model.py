"""Twelve facts about each customer of the Online Retail data, and a pipeline that says from them what the customer will spend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from sklearn.pipeline import Pipeline

ROOT = Path(__file__).parent.parent.parent
SMALL = ROOT / "examples" / "recommender" / "data" / "online_retail_small.parquet"


def customers(cutoff: str = "2011-10-01") -> tuple[pd.DataFrame, pd.Series]:
    "One row a customer with what was known at the cutoff, and what was spent after it."
    import pandas as pd

    lines = pd.read_parquet(SMALL).dropna(subset="CustomerID")
    lines["paid"] = lines["Quantity"] * lines["UnitPrice"]
    before, after, at = lines[lines["InvoiceDate"] < cutoff], lines[lines["InvoiceDate"] >= cutoff], pd.Timestamp(cutoff)
    orders = before.groupby(["CustomerID", "InvoiceNo"]).agg(paid=("paid", "sum"), at=("InvoiceDate", "min"), lines=("StockCode", "size")).reset_index().groupby("CustomerID")
    own = before.groupby("CustomerID")
    frame = pd.DataFrame({
        "days_since_last": (at - own["InvoiceDate"].max()).dt.total_seconds() / 86_400,
        "days_since_first": (at - own["InvoiceDate"].min()).dt.total_seconds() / 86_400,
        "orders": orders.size().astype(float),
        "spent": own["paid"].sum(),
        "mean_order": orders["paid"].mean(),
        "largest_order": orders["paid"].max(),
        "lines_per_order": orders["lines"].mean(),
        "products": own["StockCode"].nunique().astype(float),
        "mean_quantity": own["Quantity"].mean(),
        "mean_price": own["UnitPrice"].mean(),
        "months": own["InvoiceDate"].agg(lambda dates: float(dates.dt.to_period("M").nunique())),
        "weekend_share": own["InvoiceDate"].agg(lambda dates: float((dates.dt.dayofweek > 4).mean())),
    }).astype(float).reset_index(drop=True)
    spent = after.groupby("CustomerID")["paid"].sum().reindex(sorted(before["CustomerID"].unique())).fillna(0).reset_index(drop=True)
    return frame, spent


def fitted(frame: pd.DataFrame, spent: pd.Series, alpha: float = 1.0) -> Pipeline:
    "A scaler and a ridge regression, fitted on the named columns."
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), Ridge(alpha)).fit(frame, spent)
