"""LitServe as its documentation shows it: one row a request, one worker. `python lit.py PORT`; with BATCH in the environment so many requests share a call."""

import os
import sys

import joblib
import litserve
import pandas as pd

BATCH = int(os.environ.get("BATCH", 1))


class Customers(litserve.LitAPI):
    def setup(self, device):
        self.model = joblib.load(os.environ["MODEL"])

    def decode_request(self, request):
        return request["row"]

    def predict(self, row):
        answers = self.model.predict(pd.DataFrame(row if BATCH > 1 else [row])).tolist()
        return answers if BATCH > 1 else answers[0]

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        return {"prediction": output}


if __name__ == "__main__":
    api = Customers(max_batch_size=BATCH, batch_timeout=0.002) if BATCH > 1 else Customers()
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1, restart_workers=False).run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, log_level="error", generate_client_file=False, access_log=False)
