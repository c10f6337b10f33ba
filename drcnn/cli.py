"""The ``drcnn`` command: ``drcnn train``, ``eval``, ``check``, ``report`` and the other verbs."""

import difflib
import importlib
import sys

from drcnn.command import command
from drcnn.errors import ConfigError

VERBS = {
    "train": "train a detector from a file in configs/",
    "eval": "evaluate a trained detector on a split of a data set",
    "check": "find what is wrong with data, describe them, write a repaired copy",
    "compare": "AP differences of two runs with confidence intervals",
    "predict": "detect objects in images, folders, addresses, videos and what a camera sees",
    "export": "write a detector as a torch.export program, an AOTInductor package or ONNX",
    "benchmark": "latency, throughput and memory of detectors beside torchvision's",
    "convert": "turn weights of any known system into one safetensors file",
    "report": "write one html page about one or more runs",
    "plot": "draw losses, T and beta, and AP of one or more runs",
    "completion": "print a script that completes verbs and flags in a shell",
    "doctor": "say what is installed, what was built and what to do about each lack",
}


def usage() -> str:
    """Returns the text of ``drcnn --help``."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, text in VERBS.items())
    return (
        "usage: drcnn VERB [arguments]\n\n"
        "Dynamic R-CNN: object detectors whose training follows their proposals.\n\n"
        f"verbs:\n{verbs}\n\n"
        "drcnn VERB --help explains a verb; drcnn --version prints the version.\n"
        "Each verb is also a module: python -m drcnn.train"
    )


@command
def main(argv: list[str]) -> int:
    """Runs the verb named by the first argument and returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        from drcnn import __version__

        print(f"drcnn {__version__}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean 'drcnn {near[0]}'?" if near else f"the verbs are {', '.join(VERBS)}"
        raise ConfigError(f"drcnn has no verb {verb!r}; {hint}")
    # Imported only now, so that --help does not wait for torch.
    return importlib.import_module(f"drcnn.{verb}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
