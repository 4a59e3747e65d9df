"""A small client of Label Studio's HTTP API: `session.py` is the transport, `board.py` where tasks go."""

from vllm_batch_dagster.adapters.label_studio.board import LabelStudioBoard, open_board, title_of
from vllm_batch_dagster.adapters.label_studio.session import LabelStudioSession

__all__ = ["LabelStudioBoard", "LabelStudioSession", "open_board", "title_of"]
