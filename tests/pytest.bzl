"""A py_test that hands its file to pytest."""

load("@rules_python//python:defs.bzl", "py_test")

def pytest(name, deps, **kwargs):
    """Runs <name>.py under pytest.

    Args:
      name: the test file, less its ".py".
      deps: the folders it imports from.
      **kwargs: passed to py_test.
    """
    py_test(
        name = name,
        srcs = [
            name + ".py",
            "run_pytest.py",
        ],
        args = ["$(location %s.py)" % name],
        data = ["//:pyproject.toml"],
        main = "run_pytest.py",
        deps = [":support"] + deps,
        **kwargs
    )
