from mlops_nb.core.callable import callable_package

callable_package(__name__, "workers:serve")
