"""Predicts on pictures, folders and videos with any recipe: drawings and JSON.

    python tools/predict.py CONFIG CHECKPOINT photo.jpg folder 'x/*.png' film.mp4 --out predictions

Detection, segmentation or classification by the config, through its own test pipeline. Writes
OUT/pictures (drawn predictions; an mp4 for a video), OUT/json, and for segmentation OUT/labels.
What cannot be read is named at the end, with exit status 1, after all the rest is done.
docs/predict.md describes the files.
"""

from __future__ import annotations

import glob
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from common.cli import run_errors
from common.inference import (
    add_cuda_graphs_argument,
    check_cuda_graphs,
    one_of,
    parser_of,
    read_config,
    read_weights,
    replay_backbone,
    to_deploy,
)
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.infer import BaseInferencer
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools import mask as coco_mask
from rich.progress import Progress

from mmconv2former.checkpoint.loading import load_model

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm')
VIDEO_SUFFIXES = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')
DEFAULT_SCORE = 0.3
DEFAULT_RATE = 25.0  # frames a second, of videos that do not say
TOP = 5  # classes of a classifier


@dataclass(frozen=True)
class Source:
    """A picture or a video, and the name of what is written for it, without a suffix."""

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument('inputs', nargs='+', help='pictures, videos, folders, quoted patterns')
    parser.add_argument('--out', type=Path, required=True, help='folder to write to')
    parser.add_argument(
        '--score-thr',
        type=float,
        help=f'detections below this are left out (default: {DEFAULT_SCORE})',
    )
    parser.add_argument('--batch-size', type=int, default=1, help='pictures at a time')
    parser.add_argument('--device', help='default: cuda if it is there, else cpu')
    parser.add_argument('--no-pictures', action='store_true', help='JSON and labels only')
    parser.add_argument(
        '--no-deploy',
        action='store_true',
        help="keep the backbone's form for training, which is slower",
    )
    add_cuda_graphs_argument(parser)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f'--batch-size must be at least 1, got {args.batch_size}')
    if args.score_thr is not None and not 0 <= args.score_thr <= 1:
        parser.error(f'--score-thr must be from 0 to 1, got {args.score_thr}')
    device = find_device(args.device)
    if args.cuda_graphs:
        check_cuda_graphs(device)
    sources = find_sources(args.inputs, args.out)
    config = read_config(args)
    predictor_type = one_of(PREDICTORS, config)
    if args.score_thr is not None and predictor_type is not Detector:
        parser.error('--score-thr is for detectors only')

    with run_errors(args.traceback):
        predictor = predictor_type(config, args.checkpoint, device)
    if args.score_thr is not None:
        predictor.score_thr = args.score_thr
    if not args.no_deploy:
        to_deploy(predictor.model)
    if args.cuda_graphs:
        replay_backbone(predictor.model)
    writer = Writer(predictor, args.out, not args.no_pictures)
    with Progress() as progress:
        failures = run(predictor, writer, sources, args.batch_size, progress)
    done = len(sources) - len(failures)
    print(f'{done} of {len(sources)} inputs predicted: {args.out}')
    if failures:
        listed = ''.join(f'\n  {path}: {reason}' for path, reason in failures.items())
        raise SystemExit(f'error: these could not be predicted:{listed}')


def find_device(name: str | None) -> str:
    """The device of the command line.

    Raises:
        SystemExit: There is no such device.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # of a build without CUDA: an assertion
        reason = str(error).splitlines()[0]
        raise SystemExit(f'error: --device {name} cannot be used: {reason}') from None
    return name


# ----------------------------------------------------------------------------------------- inputs
def find_sources(inputs: Iterable[str], out: Path) -> list[Source]:
    """The files of the command line, none twice.

    Args:
        inputs: Files, folders (searched through) and patterns.
        out: Where results will lie; not searched.

    Raises:
        SystemExit: There is nothing of one of the inputs.
    """
    names: dict[Path, str] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = {file: file.relative_to(path) for file in sorted(path.rglob('*'))}
            found = {file: name for file, name in found.items() if is_input(file, out)}
        elif path.is_file():
            found = {path: Path(path.name)}
        else:
            matches = map(Path, sorted(glob.glob(text, recursive=True)))
            found = {file: Path(file.name) for file in matches if is_input(file, out)}
        if not found:
            exists = path.is_dir() or glob.has_magic(text)
            problem = 'has no pictures and no videos' if exists else 'does not exist'
            raise SystemExit(f'error: input {text} {problem}')
        for file, name in found.items():
            names.setdefault(file.resolve(), unique(str(name.with_suffix('')), names.values()))
    return [Source(path, name) for path, name in names.items()]


def is_input(path: Path, out: Path) -> bool:
    """Whether a file of a folder is a picture or a video, and no result of this tool."""
    is_known = path.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES
    is_result = out.resolve() in path.resolve().parents
    return path.is_file() and is_known and not is_result and not path.name.startswith('.')


def unique(name: str, taken: Iterable[str]) -> str:
    """The name, with a number behind it if it is taken."""
    candidate, number, taken = name, 1, set(taken)
    while candidate in taken:
        number += 1
        candidate = f'{name}_{number}'
    return candidate


def read_picture(path: Path) -> np.ndarray:
    """A picture, uint8 (H, W, 3) in the order BGR, decoded as mmcv does in a pipeline.

    Raises:
        ValueError: It cannot be read; the message says why.
    """
    try:
        with Image.open(path) as image:
            image.load()  # OpenCV would fill up a file that is cut off with grey
        picture = mmcv.imfrombytes(path.read_bytes())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, cv2.error) as error:
        raise ValueError(f'cannot be read: {str(error).splitlines()[0]}') from None
    if picture is None:
        raise ValueError('cannot be read: OpenCV does not know this kind of picture')
    return picture


# ------------------------------------------------------------------------------------- predictors
def build_dataset(config: Config) -> BaseDataset:
    """The data set that the config tests on, for its classes; its files need not be there."""
    settings = config.test_dataloader.dataset.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of missing files
        return DATASETS.build(settings | dict(lazy_init=True))


class WholeCheckpoint(BaseInferencer):
    """Stands before an inferencer of mmengine among the bases: the checkpoint must fit wholly.

    Classes are those of the checkpoint or, where it names none, of the config's data set, instead
    of COCO's and Cityscapes'.
    """

    checkpoint: str
    default_meta: dict[str, Any]

    def _load_weights_to_model(self, model: torch.nn.Module, content: dict, config: Config) -> None:
        load_model(model, content, self.checkpoint, strict=True)
        meta = content.get('meta') or {}
        dataset_meta = meta.get('dataset_meta') or self.default_meta
        meta = dict(meta, dataset_meta={key.lower(): v for key, v in dataset_meta.items()})
        super()._load_weights_to_model(model, dict(content, meta=meta), config)


class Predictor(ABC):
    """A model of one library with its inferencer, and what its predictions mean.

    Args:
        config: A whole config of that library.
        checkpoint: File with all weights of its model.
        device: As torch names it.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is of another network.
    """

    needs_equal_sizes = True  # of the pictures of a batch

    def __init__(self, config: Config, checkpoint: str, device: str) -> None:
        init_default_scope(config.default_scope)
        self.dataset = build_dataset(config)
        self.inferencer = self._build(config, checkpoint, device)
        self.model = self.inferencer.model

    @abstractmethod
    def _build(self, config: Config, checkpoint: str, device: str) -> BaseInferencer:
        """The library's inferencer."""

    def predict(self, pictures: list[np.ndarray]) -> list[Any]:
        """The library's data samples of pictures as `read_picture` returns them."""
        samples = self.inferencer(pictures, batch_size=len(pictures), return_datasamples=True)
        return samples if isinstance(samples, list) else [samples]

    @abstractmethod
    def describe(self, sample: Any) -> dict[str, Any]:
        """A prediction as JSON takes it."""

    @abstractmethod
    def draw(self, picture: np.ndarray, sample: Any) -> np.ndarray:
        """A prediction drawn on its picture, uint8 (H, W, 3) in the order RGB as the picture."""

    def labels(self, sample: Any) -> np.ndarray | None:
        """What is written as a picture of labels (H, W), if anything."""
        return None


class Detector(Predictor):
    """Boxes and masks of mmdet."""

    score_thr = DEFAULT_SCORE

    def _build(self, config: Config, checkpoint: str, device: str) -> BaseInferencer:
        from mmdet.apis import DetInferencer  # here, as users of one library have no other

        return inferencer_of(DetInferencer, self.dataset, config, checkpoint, device)

    def predict(self, pictures: list[np.ndarray]) -> list[Any]:
        results = self.inferencer(
            pictures, batch_size=len(pictures), return_datasamples=True, no_save_vis=True
        )
        return results['predictions']

    def describe(self, sample: Any) -> dict[str, Any]:
        found = sample.pred_instances.cpu()
        found = found[found.scores >= self.score_thr]
        classes = self.model.dataset_meta['classes']
        instances = [
            dict(label=label, **{'class': classes[label]}, score=score, box=box)
            for label, score, box in zip(
                found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist()
            )
        ]
        if 'masks' in found:
            for instance, mask in zip(instances, found.masks.numpy()):
                encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
                instance['mask'] = dict(encoded, counts=encoded['counts'].decode())
        return dict(instances=instances)

    def draw(self, picture: np.ndarray, sample: Any) -> np.ndarray:
        visualizer = self.inferencer.visualizer
        visualizer.add_datasample('', picture, sample, draw_gt=False, pred_score_thr=self.score_thr)
        return visualizer.get_image()


class Segmentor(Predictor):
    """Semantic labels of mmseg."""

    def _build(self, config: Config, checkpoint: str, device: str) -> BaseInferencer:
        from mmseg.apis import MMSegInferencer  # here, as users of one library have no other

        inferencer = inferencer_of(MMSegInferencer, self.dataset, config, checkpoint, device)
        meta = inferencer.model.dataset_meta
        inferencer.visualizer.set_dataset_meta(meta['classes'], meta['palette'])
        return inferencer

    def describe(self, sample: Any) -> dict[str, Any]:
        labels, areas = np.unique(sample.pred_sem_seg.data.cpu().numpy(), return_counts=True)
        order = np.argsort(-areas, kind='stable')
        classes = self.model.dataset_meta['classes']
        shares = areas / areas.sum()
        return dict(
            classes=[
                dict(
                    label=int(labels[i]),
                    **{'class': classes[labels[i]]},
                    value=int(labels[i]) + self._first_value,
                    pixels=int(areas[i]),
                    share=round(float(shares[i]), 6),
                )
                for i in order
            ]
        )

    def draw(self, picture: np.ndarray, sample: Any) -> np.ndarray:
        visualizer = self.inferencer.visualizer
        visualizer.add_datasample('', picture, sample, draw_gt=False)
        return visualizer.get_image()

    @property
    def _first_value(self) -> int:
        """What the first class has in pictures of labels: 1 where 0 is no class, as in ADE20K."""
        return int(self.dataset.reduce_zero_label)

    def labels(self, sample: Any) -> np.ndarray:
        values = sample.pred_sem_seg.data[0].cpu().numpy() + self._first_value
        fits_a_byte = len(self.model.dataset_meta['classes']) + self._first_value <= 256
        return values.astype(np.uint8 if fits_a_byte else np.uint16)


class Classifier(Predictor):
    """The most probable classes of mmpretrain."""

    needs_equal_sizes = False  # the pipeline brings all to one

    def _build(self, config: Config, checkpoint: str, device: str) -> BaseInferencer:
        # Here, as users of one library have no other.
        from mmpretrain.apis import ImageClassificationInferencer, get_model
        from mmpretrain.utils import progress
        from mmpretrain.visualization import UniversalVisualizer

        progress.disable_progress_bar = True  # there is one already
        content = read_weights(checkpoint)
        model = get_model(config, pretrained=False, device=device)
        load_model(model, content, checkpoint, strict=True)
        meta = (content.get('meta') or {}).get('dataset_meta') or self.dataset.metainfo
        classes = meta.get('classes') or [str(i) for i in range(model.head.num_classes)]
        inferencer = ImageClassificationInferencer(model, classes=classes)
        inferencer.visualizer = UniversalVisualizer()
        return inferencer

    def describe(self, sample: Any) -> dict[str, Any]:
        scores, labels = sample.pred_score.topk(min(TOP, len(sample.pred_score)))
        classes = self.inferencer.classes
        return dict(
            classes=[
                dict(label=label, **{'class': classes[label]}, score=score)
                for label, score in zip(labels.tolist(), scores.tolist())
            ]
        )

    def draw(self, picture: np.ndarray, sample: Any) -> np.ndarray:
        best = sample.pred_score.topk(min(TOP, len(sample.pred_score))).indices
        sample = sample.clone().set_pred_label(best)  # all of them are drawn
        visualizer, classes = self.inferencer.visualizer, self.inferencer.classes
        return visualizer.visualize_cls(picture, sample, classes, draw_gt=False)


PREDICTORS = {'mmdet': Detector, 'mmseg': Segmentor, 'mmpretrain': Classifier}


def inferencer_of(
    inferencer_type: type, dataset: BaseDataset, config: Config, checkpoint: str, device: str
) -> BaseInferencer:
    """An inferencer of mmengine's kind whose checkpoint fits wholly; see `WholeCheckpoint`."""
    settings = dict(checkpoint=checkpoint, default_meta=dataset.metainfo)
    config.visualizer.vis_backends = None  # nothing but `Writer` writes
    checked = type(inferencer_type.__name__, (WholeCheckpoint, inferencer_type), settings)
    inferencer = checked(model=config, weights=checkpoint, device=device)
    inferencer.show_progress = False  # no argument of mmseg's before 1.3
    return inferencer


# -------------------------------------------------------------------------------------------- run
class Writer:
    """Writes predictions of pictures and of videos below a folder."""

    def __init__(self, predictor: Predictor, out: Path, pictures: bool) -> None:
        self.predictor, self.out, self.pictures = predictor, out, pictures

    def _path(self, kind: str, name: str, suffix: str) -> Path:
        path = self.out / kind / f'{name}{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def draw(self, picture: np.ndarray, sample: Any) -> np.ndarray:
        """The drawing, of the picture's size and in its order, BGR."""
        drawn = self.predictor.draw(np.ascontiguousarray(picture[..., ::-1]), sample)
        drawn = mmcv.imresize(drawn, picture.shape[1::-1])
        return np.ascontiguousarray(drawn[..., ::-1])

    def write_picture(self, source: Source, picture: np.ndarray, sample: Any) -> None:
        height, width = picture.shape[:2]
        content = dict(image=str(source.path), width=width, height=height)
        content |= self.predictor.describe(sample)
        labels = self.predictor.labels(sample)
        if labels is not None:
            write_encoded(self._path('labels', source.name, '.png'), labels)
            content['labels'] = f'labels/{source.name}.png'
        text = json.dumps(content, ensure_ascii=False, indent=1)
        self._path('json', source.name, '.json').write_text(text, encoding='utf-8')
        if self.pictures:
            drawn = self.draw(picture, sample)
            write_encoded(self._path('pictures', source.name, '.jpg'), drawn)

    def write_video(
        self, source: Source, rate: float, frames: Iterable[tuple[np.ndarray, Any]]
    ) -> None:
        """Writes a video frame by frame; its JSON has one line a frame."""
        film = None
        try:
            with self._path('json', source.name, '.json').open('w', encoding='utf-8') as file:
                video = json.dumps(str(source.path), ensure_ascii=False)
                file.write(f'{{"video": {video}, "frames_per_second": {rate}, "frames": [')
                for index, (picture, sample) in enumerate(frames):
                    content = dict(frame=index) | self.predictor.describe(sample)
                    text = json.dumps(content, ensure_ascii=False)
                    file.write(f'{"," if index else ""}\n{text}')
                    if self.pictures:
                        drawn = self.draw(picture, sample)
                        film = film or self._open_film(source, rate, drawn)
                        film.write(drawn)
                file.write('\n]}\n')
        finally:
            if film is not None:
                film.release()

    def _open_film(self, source: Source, rate: float, frame: np.ndarray) -> cv2.VideoWriter:
        path = self._path('pictures', source.name, '.mp4')
        codec = cv2.VideoWriter.fourcc(*'mp4v')
        film = cv2.VideoWriter(str(path), codec, rate, frame.shape[1::-1])
        if not film.isOpened():
            raise SystemExit(f'error: OpenCV cannot write {path}; --no-pictures does without it')
        return film


def write_encoded(path: Path, picture: np.ndarray) -> None:
    """Writes a picture in the form that the suffix names, to a path of any letters."""
    path.write_bytes(cv2.imencode(path.suffix, picture)[1].tobytes())


def run(
    predictor: Predictor,
    writer: Writer,
    sources: Sequence[Source],
    batch_size: int,
    progress: Progress,
) -> dict[Path, str]:
    """Predicts on all sources.

    Returns:
        What could not be predicted, and why.
    """
    failures: dict[Path, str] = {}
    pictures = [source for source in sources if not source.is_video]
    if pictures:
        task = progress.add_task('pictures', total=len(pictures))
        loaded = read_pictures(pictures, failures, lambda: progress.advance(task))
        for batch in batches(loaded, batch_size, predictor.needs_equal_sizes):
            try:
                samples = predictor.predict([picture for _, picture in batch])
            except ValueError as error:  # such as of the backbone, for a picture that is too small
                failures |= {source.path: str(error) for source, _ in batch}
                continue
            for (source, picture), sample in zip(batch, samples):
                writer.write_picture(source, picture, sample)
    for source in sources:
        if source.is_video:
            try:
                run_video(predictor, writer, source, batch_size, progress)
            except ValueError as error:
                failures[source.path] = str(error)
    return failures


def read_pictures(
    sources: Iterable[Source], failures: dict[Path, str], advance: Callable[[], None]
) -> Iterator[tuple[Source, np.ndarray]]:
    """Sources with their pictures, without those that are entered in `failures`."""
    for source in sources:
        try:
            yield source, read_picture(source.path)
        except ValueError as error:
            failures[source.path] = str(error)
        advance()


def batches(
    items: Iterable[tuple[Any, np.ndarray]], batch_size: int, equal_sizes: bool
) -> Iterator[list[tuple[Any, np.ndarray]]]:
    """Consecutive items, at most so many at a time.

    With `equal_sizes` of one size of pictures: mmdet would fill smaller ones up, so that results
    depended on their neighbours, and mmseg refuses others.
    """
    batch: list[tuple[Any, np.ndarray]] = []
    for item in items:
        is_other = batch and equal_sizes and item[1].shape != batch[0][1].shape
        if is_other or len(batch) == batch_size:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def run_video(
    predictor: Predictor, writer: Writer, source: Source, batch_size: int, progress: Progress
) -> None:
    """Predicts on all frames of a video.

    Raises:
        ValueError: It cannot be read, or its frames cannot be predicted.
    """
    video = cv2.VideoCapture(str(source.path))
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    task = progress.add_task(source.path.name, total=count if count > 0 else None)
    first = next(read_frames(video), None)
    if first is None:
        video.release()
        raise ValueError('cannot be read: OpenCV finds no frames')
    rate = video.get(cv2.CAP_PROP_FPS)
    rate = rate if rate > 0 else DEFAULT_RATE

    def predicted() -> Generator[tuple[np.ndarray, Any], None, None]:
        frames = ((None, frame) for part in ([first], read_frames(video)) for frame in part)
        for batch in batches(frames, batch_size, predictor.needs_equal_sizes):
            pictures = [picture for _, picture in batch]
            yield from zip(pictures, predictor.predict(pictures))
            progress.advance(task, len(batch))

    with closing(predicted()) as frames:
        try:
            writer.write_video(source, rate, frames)
        finally:
            video.release()


def read_frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """The frames that are left, as `read_picture` returns pictures."""
    while True:
        is_read, frame = video.read()
        if not is_read:
            return
        yield frame


if __name__ == '__main__':
    main()
