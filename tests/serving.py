"""An app to ask in tests: one model behind all routes, with a token."""

from mlops_nb.core.files import digest_of
from mlops_nb.serve.access import Tokens
from mlops_nb.serve.app import app
from mlops_nb.serve.door import Desk
from mlops_nb.serve.endpoint import Endpoint, Limits
from mlops_nb.serve.inputs import columns_of
from mlops_nb.serve.journal import Journal
from mlops_nb.serve.plan import planned
from mlops_nb.serve.sources import Version

TOKEN = "a-token-for-tests"


class Only:
    """A source with one version of one model."""

    def __init__(self, predict, inputs, name="shelf", version="3", example=None):
        self.predict, self.version = predict, Version(name, version, "d1", columns_of(inputs), example)

    def resolve(self, name, selector):
        return self.version

    def load(self, version):
        return self.predict

    def stamp(self):
        return 0


class Function:
    """A function as a model."""

    def __init__(self, predict):
        self.predict = predict


def endpoint_of(predict, inputs, *, limits=Limits(), journal=None, example=None, name="shelf") -> Endpoint:
    source = Only(Function(predict) if not hasattr(predict, "predict") else predict, inputs, name, example=example)
    made = Endpoint(source, lambda: planned(f"{name}@3"), journal, limits)
    made.follow()
    return made




def asking_app(predict, inputs, *, desk=None, **more):
    """The app of one model; `desk` are further fields of the desk."""
    return app(Desk(endpoint_of(predict, inputs, **more), Tokens(None, also=[digest_of(TOKEN.encode())]), "i1", **(desk or {})))


def journal_of(write) -> Journal:
    return Journal(write, pause_s=0)
