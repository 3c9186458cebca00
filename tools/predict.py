"""Predicts on images, folders and videos with any recipe; writes drawings and JSON.

    python tools/predict.py CONFIG CHECKPOINT photo.jpg folder 'x/*.png' film.mp4 --out predictions

The config decides between detection, segmentation and classification; images go through its own
test pipeline. Writes OUT/pictures (drawn predictions, an mp4 for a video), OUT/json and, for
segmentation, OUT/labels. Inputs that cannot be predicted are listed at the end, with exit status 1.
docs/predict.md describes the files.
"""

from __future__ import annotations

import glob
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import common  # before torch
import cv2
import mmcv
import numpy as np
import torch
from common.cli import run_errors
from common.inference import (
    UniqueNames,
    add_cuda_graphs_argument,
    build_visualizer,
    check_cuda_graphs,
    draw,
    load_for_drawing,
    load_whole_model,
    parser_for_model,
    read_config,
    replay_backbone,
    settings_of_files,
    to_deploy,
)
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS
from pycocotools import mask as coco_mask
from rich.progress import track
from torch import nn

from mmconv2former.datasets.checked import CheckedPipeline, DataError, reason
from mmconv2former.engine.dry_run import with_threshold
from mmconv2former.text import printable

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')
DEFAULT_SCORE = 0.3
DEFAULT_RATE = 25.0  # frames per second, for videos that do not state it
TOP = 5  # classes of a classifier
RESULTS = ('pictures', 'labels', 'json')  # folders
# Of one input, e.g. an image of another size for CUDA graphs, or too large for the memory.
FAILURES = (ValueError, RuntimeError, MemoryError)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for_model(__doc__)
    parser.add_argument('inputs', nargs='+', help='images, videos, folders, quoted patterns')
    parser.add_argument('--out', type=Path, required=True, help='output folder')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=DEFAULT_SCORE,
        help=f'drop detections below this score (default: {DEFAULT_SCORE})',
    )
    parser.add_argument(
        '--batch-size', type=common.at_least(1), default=1, help='number of images at a time'
    )
    parser.add_argument('--device', help='default: cuda if available, otherwise cpu')
    parser.add_argument('--no-pictures', action='store_true', help='write no drawings')
    parser.add_argument(
        '--no-deploy', action='store_true', help='do not fold the backbone for inference; slower'
    )
    add_cuda_graphs_argument(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.score_thr <= 1:
        parser.error(f'--score-thr must be between 0 and 1, got {args.score_thr}')
    device = find_device(args.device)
    if args.cuda_graphs:
        check_cuda_graphs(device)
    sources = find_sources(args.inputs, args.out)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--out {args.out} cannot be a folder: {error.strerror}')
    config = read_config(args)

    with run_errors(args.traceback):
        predictor = Predictor(config, args.checkpoint, device, args.score_thr)
    if not args.no_deploy:
        to_deploy(predictor.model)
    if args.cuda_graphs:
        replay_backbone(predictor.model)
    writer = Writer(predictor, args.out, not args.no_pictures)
    images = [source for source in sources if not source.is_video]
    failures = predict_images(predictor, writer, images, args.batch_size)
    for source in sources:
        if source.is_video:
            try:
                predict_video(predictor, writer, source, args.batch_size)
            except FAILURES as error:
                failures.append(f'video {source.path}: {why(error)}')
    print(f'{len(sources) - len(failures)} of {len(sources)} inputs predicted: {args.out}')
    if failures:
        lines = map(printable, failures)
        raise SystemExit('\n  '.join(['error: these could not be predicted:', *lines]))


def find_device(name: str | None) -> str:
    """The device from the command line.

    Raises:
        SystemExit: There is no such device.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA raises the second
        reason = str(error).splitlines()[0]
        raise SystemExit(f'error: --device {name} cannot be used: {reason}') from None
    return name


# ----------------------------------------------------------------------------------------- inputs
@dataclass(frozen=True)
class Source:
    """An image or a video, and the name of its results, without a suffix."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def find_sources(inputs: Iterable[str], out: Path) -> list[Source]:
    """The files from the command line, each once.

    Args:
        inputs: Files, folders (searched with their subfolders) and patterns.
        out: Folder of the results, which are no inputs: they could be overwritten.

    Raises:
        SystemExit: An input does not exist, or has no images and videos other than results.
    """
    sources: dict[Path, Source] = {}
    names = UniqueNames()
    for text in inputs:
        path = Path(text)
        if path.is_file():
            files = [path]
        else:
            found = path.rglob('*') if path.is_dir() else map(Path, glob.glob(text, recursive=True))
            files = sorted(filter(is_input, found))
        inputs_ = [file for file in files if not is_result(file, out)]
        if not inputs_:
            if files:
                problem = f'has only results in {out}: choose another --out'
            elif path.is_dir() or glob.has_magic(text):
                problem = 'has no images and no videos'
            else:
                problem = 'does not exist'
            raise SystemExit(f'error: input {text} {problem}')
        for file in inputs_:
            wanted = file.relative_to(path) if path.is_dir() else file.name
            resolved = file.resolve()
            # The suffix of a link counts, not that of the file where it leads.
            sources[resolved] = Source(Path(os.path.abspath(file)), names.name(resolved, wanted))
    return list(sources.values())


def is_input(path: Path) -> bool:
    """Whether a file is a visible image or video."""
    is_known = path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
    return path.is_file() and is_known and not path.name.startswith('.')


def is_result(path: Path, out: Path) -> bool:
    return any((out / kind).resolve() in path.resolve().parents for kind in RESULTS)


# -------------------------------------------------------------------------------------- predictor
class Predictor:
    """A model with its test pipeline and the meaning of its predictions.

    Args:
        config: A whole config of mmdet, mmseg or mmpretrain.
        checkpoint: File with all weights of its model.
        device: Device, in torch's notation.
        score_thr: Detections with a lower score are dropped.

    Raises:
        SystemExit: The config has no pipeline for single files.
        CheckpointError: The checkpoint cannot be read, or is of another network.
    """

    def __init__(self, config: Config, checkpoint: str, device: str, score_thr: float) -> None:
        data = settings_of_files(config)
        self.score_thr = score_thr
        for settings in with_threshold(config.model.get('test_cfg')):
            settings['score_thr'] = min(settings['score_thr'], score_thr)
        self.model = load_whole_model(config, checkpoint).to(device)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the dataset's files need not be there
            dataset = DATASETS.build(dict(data, lazy_init=True))
        meta = self.model.dataset_meta or dataset.metainfo
        self.classes = meta.get('classes')
        self.first_value = int(getattr(dataset, 'reduce_zero_label', False))
        self.channels = next(
            layer.in_channels for layer in self.model.modules() if isinstance(layer, nn.Conv2d)
        )
        self.visualizer = build_visualizer(config, meta)
        steps = [
            step for step in dataset.pipeline.transforms if not isinstance(step, LoadAnnotations)
        ]
        self.loader, *rest = steps
        if isinstance(self.loader, LoadImageFromFile):
            self.loader.backend_args = self.loader.file_client_args = None  # inputs are local files
        self.of_file = CheckedPipeline(Compose(steps), dataset)
        self.of_frame = Compose(rest)

    def load(self, path: Path) -> Any:
        """An image file as the network takes it.

        Raises:
            DataError: It cannot be read; the message names it.
        """
        return self.of_file(dict(img_path=str(path), img_id=0))

    def prepare(self, frame: np.ndarray) -> Any:
        """A frame of a video, uint8 (H, W, 3) in BGR, as the network takes it.

        It has the colours and the type that an image file would have after loading.

        Raises:
            ValueError: The pipeline does not begin with loading one image file.
        """
        if not isinstance(self.loader, LoadImageFromFile):
            name = type(self.loader).__name__
            raise ValueError(
                f'videos need a pipeline that begins with LoadImageFromFile, not {name}'
            )
        size = frame.shape[:2]
        stored = cv2.imencode('.bmp', frame)[1].tobytes()
        image = mmcv.imfrombytes(stored, flag=self.loader.color_type)
        if self.loader.to_float32:
            image = image.astype(np.float32)
        return self.of_frame(dict(img=image, img_path='', img_id=0, img_shape=size, ori_shape=size))

    def predict(self, inputs: list[dict[str, Any]]) -> list[Any]:
        """The host library's data samples for what `load` and `prepare` return.

        Raises:
            ValueError: The network takes images of other channels, or of another size.
        """
        try:
            with torch.no_grad():
                samples = self.model.test_step(pseudo_collate(inputs))
        except Exception as error:  # of any library
            channels = inputs[0]['inputs'].shape[0]
            if channels == self.channels:
                raise
            raise ValueError(
                f'it has {channels} channels after loading, the network takes {self.channels} '
                '(color_type of LoadImageFromFile)'
            ) from error
        for sample in samples:
            if 'pred_instances' in sample:
                found = sample.pred_instances
                sample.pred_instances = found[found.scores >= self.score_thr]
        return [sample.cpu() for sample in samples]

    def draw(self, image: np.ndarray, sample: Any) -> np.ndarray:
        """A prediction drawn on its image, both uint8 (H, W, 3) in BGR."""
        if 'pred_score' in sample:  # draw all classes that `describe` lists
            sample = sample.clone().set_pred_label(top_classes(sample.pred_score))
        image = np.ascontiguousarray(image[..., ::-1])
        drawn = draw(self.visualizer, image, sample, score_thr=self.score_thr, draw_gt=False)
        return np.ascontiguousarray(drawn[..., ::-1])

    def describe(self, sample: Any) -> dict[str, Any]:
        """A prediction as JSON."""
        if 'pred_instances' in sample:
            return dict(instances=self._instances(sample.pred_instances))
        if 'pred_sem_seg' in sample:
            return dict(classes=self._regions(sample.pred_sem_seg.data.numpy()))
        if 'pred_score' not in sample:
            raise SystemExit(
                'error: objects, masks, semantic labels and classes can be written, not '
                f'{", ".join(sample.keys())} of {type(self.model).__name__}'
            )
        best = top_classes(sample.pred_score)
        return dict(
            classes=[
                self._named(label, score=score)
                for label, score in zip(best.tolist(), sample.pred_score[best].tolist())
            ]
        )

    def _named(self, label: int, **values: Any) -> dict[str, Any]:
        # A binary head (out_channels=1) predicts 0 and 1, even if its dataset has one class.
        is_named = self.classes and label < len(self.classes)
        name = self.classes[label] if is_named else str(label)
        return dict(label=label, **{'class': name}, **values)

    def _instances(self, found: Any) -> list[dict[str, Any]]:
        instances = [
            self._named(label, score=score, box=box)
            for label, score, box in zip(
                found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist()
            )
        ]
        for instance, mask in zip(instances, found.masks.numpy() if 'masks' in found else ()):
            encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            instance['mask'] = dict(encoded, counts=encoded['counts'].decode())
        return instances

    def _regions(self, labels: np.ndarray) -> list[dict[str, Any]]:
        """The classes of a label map, the largest first."""
        found, areas = np.unique(labels, return_counts=True)
        return [
            self._named(
                int(found[i]),
                value=int(found[i]) + self.first_value,
                pixels=int(areas[i]),
                share=round(float(areas[i] / areas.sum()), 6),
            )
            for i in np.argsort(-areas, kind='stable')
        ]

    def labels(self, sample: Any) -> np.ndarray | None:
        """The label image (H, W) of a segmentation; 0 is no class if the dataset defines it so."""
        if 'pred_sem_seg' not in sample:
            return None
        values = sample.pred_sem_seg.data[0].numpy() + self.first_value
        return values.astype(np.uint8 if len(self.classes) + self.first_value <= 256 else np.uint16)


def top_classes(scores: torch.Tensor) -> torch.Tensor:
    """The labels of the highest scores."""
    return scores.topk(min(TOP, len(scores))).indices


# -------------------------------------------------------------------------------------------- run
class Writer:
    """Writes predictions below a folder; `with_drawings` says whether to draw them."""

    def __init__(self, predictor: Predictor, out: Path, with_drawings: bool) -> None:
        self.predictor, self.out, self.with_drawings = predictor, out, with_drawings

    def path(self, kind: str, name: str, suffix: str) -> Path:
        """A file of `RESULTS`, in its folder. A link there, maybe to an input, is not followed."""
        path = self.out / kind / f'{name}{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        return path

    def write_image(self, source: Source, sample: Any) -> None:
        height, width = sample.ori_shape
        content = dict(image=str(source.path), width=width, height=height)
        content |= self.predictor.describe(sample)
        labels = self.predictor.labels(sample)
        if labels is not None:
            mmcv.imwrite(labels, str(self.path('labels', source.name, '.png')))
            content['labels'] = f'labels/{source.name}.png'
        text = json.dumps(content, ensure_ascii=False, indent=1)
        with self.open_json(source) as file:
            file.write(text)
        if self.with_drawings:
            image = load_for_drawing(self.predictor.loader, source.path)
            drawn = self.predictor.draw(image, sample)
            mmcv.imwrite(drawn, str(self.path('pictures', source.name, '.jpg')))

    def open_json(self, source: Source) -> TextIO:
        # JSON has the same escapes for what UTF-8 cannot express, as of names in Latin-1.
        path = self.path('json', source.name, '.json')
        return path.open('w', encoding='utf-8', errors='backslashreplace')

    def write_video(
        self, source: Source, rate: float, frames: Iterable[tuple[np.ndarray, Any]]
    ) -> None:
        """Writes a video frame by frame; its JSON has one line per frame.

        Raises:
            SystemExit: OpenCV cannot write videos.
        """
        film = None
        with self.open_json(source) as file:
            video = json.dumps(str(source.path), ensure_ascii=False)
            file.write(f'{{"video": {video}, "frames_per_second": {rate}, "frames": [')
            try:
                for index, (frame, sample) in enumerate(frames):
                    content = dict(frame=index) | self.predictor.describe(sample)
                    text = json.dumps(content, ensure_ascii=False)
                    file.write(f'{"," if index else ""}\n{text}')
                    if self.with_drawings:
                        path = str(self.path('pictures', source.name, '.mp4'))
                        codec = cv2.VideoWriter.fourcc(*'mp4v')
                        film = film or cv2.VideoWriter(path, codec, rate, frame.shape[1::-1])
                        if not film.isOpened():
                            raise SystemExit(
                                f'error: OpenCV cannot write {path}; use --no-pictures'
                            )
                        film.write(self.predictor.draw(frame, sample))
            finally:  # of a video that fails halfway, the frames until then are kept
                if film is not None:
                    film.release()
                file.write('\n]}\n')


def predict_images(
    predictor: Predictor, writer: Writer, sources: Sequence[Source], batch_size: int
) -> list[str]:
    """Predicts on image files; returns which could not be predicted and why."""
    failures: list[str] = []

    def load() -> Iterator[tuple[Source, dict[str, Any]]]:
        for source in track(sources, 'images', disable=not sources):
            try:
                yield source, predictor.load(source.path)
            except DataError as error:
                failures.append(str(error))

    for batch in batches(load(), batch_size):
        try:
            samples = predictor.predict([inputs for _, inputs in batch])
        except FAILURES as error:
            failures += [f'image {source.path}: {why(error)}' for source, _ in batch]
            continue
        for (source, _), sample in zip(batch, samples):
            try:
                writer.write_image(source, sample)
            except (OSError, *FAILURES) as error:
                failures.append(f'image {source.path}: {why(error)}')
    return failures


def predict_video(predictor: Predictor, writer: Writer, source: Source, batch_size: int) -> None:
    """Predicts on all frames of a video.

    Raises:
        ValueError, RuntimeError: It cannot be read, or its frames cannot be predicted.
    """
    video = cv2.VideoCapture(str(source.path))
    rest = read_frames(video)
    first = next(rest, None)
    if first is None:
        raise ValueError('OpenCV finds no frames in it')
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    frames = track(chain([first], rest), source.path.name, total=count if count > 0 else None)

    def predictions() -> Iterator[tuple[np.ndarray, Any]]:
        prepared = ((frame, predictor.prepare(frame)) for frame in frames)
        for batch in batches(prepared, batch_size):
            samples = predictor.predict([inputs for _, inputs in batch])
            yield from zip((frame for frame, _ in batch), samples)

    rate = video.get(cv2.CAP_PROP_FPS)
    found = predictions()
    found = chain([next(found)], found)  # if the first frame fails, nothing is written
    writer.write_video(source, rate if rate > 0 else DEFAULT_RATE, found)


def why(error: Exception) -> str:
    """The reason of a failure on one line, with the type of errors that are not of ours."""
    return str(error) if isinstance(error, ValueError) else reason(error)


def read_frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        is_read, frame = video.read()
        if not is_read:
            return
        yield frame


def batches(
    items: Iterable[tuple[Any, dict[str, Any]]], batch_size: int
) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Groups consecutive items whose inputs have one size, at most `batch_size` each.

    mmdet would pad smaller images, so that results would depend on the rest of the batch.
    """
    batch: list[tuple[Any, dict[str, Any]]] = []
    for item in items:
        is_other = batch and item[1]['inputs'].shape != batch[0][1]['inputs'].shape
        if is_other or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


if __name__ == '__main__':
    main()
