"""Runs tools and looks at what they wrote."""

import os
import sys
import tempfile
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import cv2
import numpy as np

from helpers import ROOT
from helpers.in_process import load_tool, typed


@contextmanager
def captured(file):
    """Writes what this process and its children print into a file."""
    saved = [os.dup(1), os.dup(2)]
    try:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        with redirect_stdout(file), redirect_stderr(file):
            yield
    finally:
        for stream, copy in enumerate(saved, start=1):
            os.dup2(copy, stream)
            os.close(copy)


def run_tool(name, *args, succeeds=True):
    """Runs a tool from the root of the project and returns what it printed, errors included."""
    name, error = name.removesuffix('.py'), None
    with (
        tempfile.TemporaryFile('w+', buffering=1, errors='replace') as file,
        captured(file),
        typed([f'tools/{name}.py', *args]),
    ):
        os.chdir(ROOT)
        try:
            load_tool(name).main()
        except SystemExit as stop:
            error = stop.code
            if isinstance(error, str):
                print(error)
        except Exception as failure:  # as the interpreter ends
            error = failure
            traceback.print_exc(file=sys.stdout)
        file.seek(0)
        output = file.read()
    assert (not error) == succeeds, output
    return output


def assert_drawn_beside(drawing, image):
    """A drawing has truth and prediction side by side, and something is drawn on both."""
    image, drawing = cv2.imread(str(image)), cv2.imread(str(drawing))
    height, width = image.shape[:2]
    assert drawing.shape == (height, 2 * width, 3)
    # Compressed as the drawing is.
    stored = cv2.imdecode(cv2.imencode('.jpg', image)[1], cv2.IMREAD_COLOR)
    for half in (drawing[:, :width], drawing[:, width:]):
        assert np.abs(half.astype(float) - stored).mean() > 1
