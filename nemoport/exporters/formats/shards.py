"""A tensor that was saved in boxes, put together again, with the proof that the boxes tile it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from nemoport.errors import DamagedInput
from nemoport.exporters.tensor import LazyTensor, Mosaic

Corner = tuple[int, ...]


def tiled(
    name: str, shape: tuple[int, ...], dtype: str, pieces: Sequence[tuple[Corner, LazyTensor]], where: str
) -> LazyTensor:
    """The whole tensor. Ranks that own nothing of it write empty boxes, which are left out."""
    boxes = []
    for corner, piece in pieces:
        if len(corner) != len(shape) or len(piece.shape) != len(shape):
            raise DamagedInput(f"{where} has a chunk of {name} with {len(corner)} axes, its shape is {list(shape)}")
        if any(low < 0 or low + size > full for low, size, full in zip(corner, piece.shape, shape, strict=True)):
            raise DamagedInput(f"{where} has a chunk of {name} at {list(corner)} outside its shape {list(shape)}")
        if prod(piece.shape) or not prod(shape):
            boxes.append((corner, piece))
    covered = sum(prod(piece.shape) for _, piece in boxes)
    if covered != prod(shape):
        raise DamagedInput(f"{where}: the chunks of {name} hold {covered} elements, its shape {list(shape)} others")
    if len(boxes) == 1 and boxes[0][1].shape == shape:
        return boxes[0][1]
    _check_apart(name, boxes, where)
    return Mosaic(shape, dtype, tuple(boxes))


def _check_apart(name: str, boxes: Sequence[tuple[Corner, LazyTensor]], where: str) -> None:
    """No two boxes share an element. Boxes inside the shape whose volumes add up to it then leave none out."""
    spans = [[(low, low + size) for low, size in zip(corner, piece.shape, strict=True)] for corner, piece in boxes]
    if not spans or not spans[0]:
        return
    # Swept along the axis that is cut most, so that few boxes are open at a time.
    axis = max(range(len(spans[0])), key=lambda axis: len({box[axis] for box in spans}))
    open_boxes: list[list[tuple[int, int]]] = []
    for box in sorted(spans, key=lambda box: box[axis]):
        open_boxes = [other for other in open_boxes if other[axis][1] > box[axis][0]]
        for other in open_boxes:
            if all(low < end and begin < high for (low, high), (begin, end) in zip(box, other, strict=True)):
                raise DamagedInput(f"{where}: chunks of {name} overlap, at {[low for low, _ in box]}; it was damaged")
        open_boxes.append(box)
