"""What benchmarks/serve.py and tests/test_serve_load.py use: a model, a client that counts every outcome, and the peers' small apps."""
