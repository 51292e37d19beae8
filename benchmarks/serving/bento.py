"""BentoML's service, one worker. `bentoml serve bento:Customers --port PORT`."""

import os

import bentoml
import joblib
import pandas as pd


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Customers:
    def __init__(self):
        self.model = joblib.load(os.environ["MODEL"])

    @bentoml.api
    def predict(self, rows: list[dict]) -> list[float]:
        return self.model.predict(pd.DataFrame(rows)).tolist()

    @bentoml.api(batchable=True, max_latency_ms=60_000, max_batch_size=100)
    def shared(self, rows: list[dict]) -> list[float]:
        return self.model.predict(pd.DataFrame(rows)).tolist()
