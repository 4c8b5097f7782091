"""Options of ``pytest benchmarks/``."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the cases at their own size, with every provider installed")
