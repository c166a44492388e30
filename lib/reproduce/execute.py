"""One notebook through Papermill, in a process that ends when the batch that began it does.

``python execute.py NOTEBOOK OUTPUT PARAMETERS.json``
"""

import json
import os
import sys
import threading
import time


def _end_with(parent: int) -> None:
    """Leave when the parent is gone: nobody would read what comes out. The kernel notices the same of this process."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(notebook: str, output: str, values: str) -> int:
    """Run it; 1 when a cell failed, which the output shows."""
    # jsonschema would build its parsers of international addresses, for seconds; no notebook's schema asks for them.
    sys.modules.setdefault("rfc3987_syntax", None)
    from papermill import execute_notebook
    from papermill.exceptions import PapermillException

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with open(values, encoding="utf-8") as file:
        parameters = json.load(file)
    try:
        execute_notebook(notebook, output, parameters, kernel_name="python3", progress_bar=False)
    except PapermillException as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
