"""Answers to learn from; drawn as for evaluation."""

from puna.infer.draw import Drawn as Drawn
from puna.infer.draw import draw_answers as draw_answers
