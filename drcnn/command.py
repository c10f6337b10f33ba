"""What every verb of the command line shares: one-line errors, exit codes and quiet interruption."""

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable

from drcnn.errors import DrcnnError, RankStopped

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system calls a full disk, a quota that is used up, and a file that may not grow."""

_WORKER = re.compile(r"Caught \w+ in (DataLoader worker process|pin memory thread)")


def one_line(error: BaseException) -> str:
    """Gives an error's message as one line.

    An error raised in a loader's worker arrives wrapped in the worker's traceback; its own message is the
    last line of that text.
    """
    text = str(error).strip()
    if _WORKER.match(text):
        text = text.splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split())


def command(function: Callable[[list[str]], int]) -> Callable[[list[str] | None], int]:
    """Wraps ``function(argv) -> exit code`` as the ``main`` of a verb.

    A :class:`~drcnn.errors.DrcnnError` becomes one line on stderr and exit code 2, and so does a full disk;
    Ctrl-C exits with 130; a reader that went away (``drcnn ... | head``) ends the verb without a traceback.
    """

    @functools.wraps(function)
    def main(argv: list[str] | None = None) -> int:
        try:
            return function(list(sys.argv[1:] if argv is None else argv))
        except DrcnnError as error:
            if not isinstance(error, RankStopped):
                print(f"error: {one_line(error)}", file=sys.stderr)
            return USER_ERROR
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Python flushes stdout once more at exit; give it somewhere to write.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return BROKEN_PIPE
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            where = f" in {error.filename}" if error.filename else " for the output"
            print(f"error: {error.strerror}{where}; free space", file=sys.stderr)
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                return USER_ERROR
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return USER_ERROR

    return main
