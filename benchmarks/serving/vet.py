"""vetiver's API with its check of the prototype. `python vet.py PORT`."""

import json
import os
import sys

import joblib
import pandas as pd
import uvicorn
from vetiver import VetiverAPI, VetiverModel

rows = json.loads(open(os.environ["ROWS"]).read())
prototype = pd.DataFrame(rows["data"], columns=rows["columns"])
api = VetiverAPI(VetiverModel(joblib.load(os.environ["MODEL"]), "customers", prototype_data=prototype), check_prototype=True)

if __name__ == "__main__":
    uvicorn.run(api.app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False)
