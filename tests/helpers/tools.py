"""Runs tools and looks at what they wrote."""

import subprocess
import sys

import cv2
import numpy as np
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

from helpers import ROOT


def forget_visualizers():
    """What mmengine keeps by name, of each class and of their base, for the whole process."""
    classes = {type(visualizer) for visualizer in Visualizer._instance_dict.values()}
    for cls in (Visualizer, *classes):
        cls._instance_dict.clear()


def forget_instances():
    """The same, and all loggers and scopes: for a second run in one test."""
    forget_visualizers()
    for manager in (MMLogger, MessageHub, DefaultScope):
        manager._instance_dict.clear()


def run_tool(name, *args, succeeds=True):
    """Runs a tool from the root of the project and returns what it printed, errors included."""
    result = subprocess.run(
        [sys.executable, f'tools/{name}', *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode == 0) == succeeds, result.stdout
    return result.stdout


def assert_drawn_beside(drawing, picture):
    """A drawing has truth and prediction side by side, and something is drawn on both."""
    picture, drawing = cv2.imread(str(picture)), cv2.imread(str(drawing))
    height, width = picture.shape[:2]
    assert drawing.shape == (height, 2 * width, 3)
    # The picture as a JPEG, as the drawing is.
    stored = cv2.imdecode(cv2.imencode('.jpg', picture)[1], cv2.IMREAD_COLOR)
    for half in (drawing[:, :width], drawing[:, width:]):
        assert np.abs(half.astype(float) - stored).mean() > 1
