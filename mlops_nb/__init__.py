"""From a trained model in a notebook to a healthy production asset, without leaving JupyterLab."""

__version__ = "0.1.0"
# What a notebook needs beside the verbs: a step's results, an endpoint to ask, a model to use, facts to keep with it.
LOOKUPS = {"output": "core.step", "deployment": "deploy.deployments", "load_model": "model.registry", "attach": "model.registry"}


def __getattr__(name: str) -> object:
    from mlops_nb.interface.verbs import VERBS

    if name in VERBS:
        return VERBS[name].target
    if name in LOOKUPS:
        from importlib import import_module

        return getattr(import_module(f"mlops_nb.{LOOKUPS[name]}"), name)
    raise AttributeError(f"module 'mlops_nb' has no attribute {name!r}")


def __dir__() -> list[str]:
    from mlops_nb.interface.verbs import VERBS

    return [*VERBS, *LOOKUPS, "__version__"]


def load_ipython_extension(shell: object) -> None:
    """`%load_ext mlops_nb`: the %mlops and %%mlops magics, with completion."""
    from mlops_nb.interface.magics import load

    load(shell)


def unload_ipython_extension(shell: object) -> None:
    """`%unload_ext mlops_nb`."""
    from mlops_nb.interface.magics import unload

    unload(shell)


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    """Where JupyterLab finds the panel."""
    return [{"src": "labextension", "dest": "mlops-nb"}]


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    """Where a Jupyter server finds the routes."""
    return [{"module": "mlops_nb.interface.lab"}]
