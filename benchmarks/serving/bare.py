"""A bare ASGI app: read the body, parse it with orjson, make the frame the model was trained on, predict, answer. `granian --interface asginl bare:app`."""

import os

import joblib
import orjson
import pandas as pd

model = joblib.load(os.environ["MODEL"])
columns = list(model.feature_names_in_)


async def app(scope, receive, send):
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    answer = b"{}"
    if scope["path"] == "/invocations":
        split = orjson.loads(body)["dataframe_split"]
        answer = orjson.dumps({"predictions": model.predict(pd.DataFrame(split["data"], columns=split["columns"])[columns]).tolist()})
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]})
    await send({"type": "http.response.body", "body": answer})
