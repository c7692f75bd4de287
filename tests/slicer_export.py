"""What 3D Slicer's MONAI Label module does to a mask and at "Submit label", in a headless Slicer core.

Run by the Python of an environment with ``slicer-core``; it reads a list of `Job`s as JSON from its standard input and
writes the ``label_info`` of each to the file named by its only argument. The calls are those of the module's
``updateSegmentationMask``, ``onClearScribblesSegmentNodes`` and ``onSaveLabel``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypedDict


class Job(TypedDict):
    """A submission: a mask that the server delivered, what is done to it, and the files that it is exported to.

    ``names`` are those of the mask's values, from 1; ``shown`` are the segments that stay, in their order. The
    segment ``error_name`` is filled from ``errors``, another label map.
    """

    scan: str
    mask: str
    names: list[str]
    shown: list[str]
    error_name: str
    errors: str | None
    outputs: list[str]


def export(job: Job) -> list[dict[str, str | int]]:
    """Write the outputs, and return the ``label_info`` that is sent along."""
    import slicer
    import vtk

    scene = slicer.vtkMRMLScene()
    logic = slicer.vtkSlicerSegmentationsModuleLogic()
    logic.SetMRMLScene(scene)
    slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)

    def run(done: bool, what: str) -> None:
        if not done:
            raise RuntimeError(what)

    def load(path: str, kind: str) -> Any:
        node = scene.AddNewNodeByClass(kind)
        storage = node.CreateDefaultStorageNode()
        storage.SetFileName(path)
        run(storage.ReadData(node), path)
        return node

    def save(node: Any, path: str) -> None:
        storage = node.CreateDefaultStorageNode()
        storage.SetFileName(path)
        run(storage.WriteData(node), path)

    def strings(values: list[str]) -> Any:
        made = vtk.vtkStringArray()
        for value in values:
            made.InsertNextValue(value)
        return made

    volume = load(job["scan"], "vtkMRMLScalarVolumeNode")
    node = scene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    segmentation = node.GetSegmentation()
    for name in job["names"]:
        segmentation.AddEmptySegment(name, name, [1.0, 0.0, 0.0])

    def fill(path: str, names: list[str]) -> None:
        labels = load(path, "vtkMRMLLabelMapVolumeNode")
        run(logic.ImportLabelmapToSegmentationNode(labels, node, strings(names)), path)

    fill(job["mask"], job["names"])
    if job["errors"] is not None:
        fill(job["errors"], [job["error_name"]])
    for name in set(job["names"]) - set(job["shown"]):
        segmentation.RemoveSegment(name)
    for index, name in enumerate(job["shown"]):
        segmentation.SetSegmentIndex(name, index)

    ids = [segmentation.GetNthSegmentID(i) for i in range(segmentation.GetNumberOfSegments())]
    for segment in ids:
        if "scribbles" in segment:
            image = slicer.vtkOrientedImageData()
            node.GetBinaryLabelmapRepresentation(segment, image)
            slicer.vtkOrientedImageDataResample.FillImage(image, 0, image.GetExtent())
            run(logic.SetBinaryLabelmapToSegment(image, node, segment, logic.MODE_REPLACE), segment)

    info: list[dict[str, str | int]] = []
    kept = []
    for index, segment in enumerate(ids):
        name = segmentation.GetSegment(segment).GetName()
        if name not in ("background", "foreground_scribbles", "background_scribbles"):
            kept.append(segment)
            info.append({"name": name, "idx": index + 1})
    labels = scene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode")
    run(logic.ExportSegmentsToLabelmapNode(node, strings(kept), labels, volume), "export")
    for path in job["outputs"]:
        save(node if path.endswith(".seg.nrrd") else labels, path)
    return info


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([export(job) for job in json.load(sys.stdin)]))
