"""Reading data: the index of a full MIMIC-CXR-JPG, its reports, and images to pixel values.

`python bench/bench_data.py` prints every figure; `pytest --benchmark bench/bench_data.py` times the
parts. The tree is synthetic: full-size tables (227,835 studies of 65,379 patients, 377,110 images),
but report files for the first 5,000 studies only, since many small files would measure the disk,
not the reader. Images are grey JPEGs of smoothed noise, 2,544 x 3,056 pixels, the most frequent
size in MIMIC-CXR-JPG. Times are CPU times of one core.

`python bench/bench_data.py --full_tree FOLDER` writes all reports and an empty file per image
(900,000 files, 2.5 GB, kept) and measures wall time of index and reports, with a cold page cache if
it can be dropped (as root on Linux).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from cpo_fast.data import mimic_index, open_studies
from cpo_fast.data.images import load_shades
from cpo_fast.data.pixels import MAX_PIXELS, MIN_PIXELS, pixel_values
from cpo_fast.types import FINDINGS, ImageRef

STUDIES, PATIENTS, IMAGES = 227_835, 65_379, 377_110
WITH_REPORTS = 5_000
NAMES = ("split", "metadata", "chexpert")

_REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough.

 FINDINGS:

 Frontal and lateral views of the chest. Study {number}. The lungs are clear without
 focal consolidation, effusion or pneumothorax. Cardiomediastinal silhouette is
 within normal limits.

 IMPRESSION:

 No acute cardiopulmonary process.
"""


def get_table_path(root: Path, name: str) -> str:
    return str(root / f"mimic-cxr-2.0.0-{name}.csv.gz")


def write_tree(root: Path, *, full: bool = False) -> None:
    """Write synthetic tables of MIMIC-CXR's size and some reports; if `full`, all reports and an
    empty file per image."""
    rng = np.random.default_rng(0)
    patient = np.sort(np.r_[np.arange(PATIENTS), rng.integers(0, PATIENTS, STUDIES - PATIENTS)])
    study = 50_000_000 + rng.choice(9_999_999, STUDIES, replace=False)
    of_image = np.sort(np.r_[np.arange(STUDIES), rng.integers(0, STUDIES, IMAGES - STUDIES)])
    ids = rng.integers(0, 2**32, (IMAGES, 5))
    views = rng.choice(["PA", "AP", "LATERAL", "LL", ""], IMAGES, p=[0.26, 0.39, 0.22, 0.09, 0.04])
    date = rng.integers(21_100_101, 22_051_231, STUDIES)
    label = rng.choice(["", "1.0", "0.0", "-1.0"], (STUDIES, 14), p=[0.8, 0.12, 0.05, 0.03])
    header = {
        "split": ("dicom_id", "study_id", "subject_id", "split"),
        "metadata": ("dicom_id", "subject_id", "study_id", "ViewPosition", "Rows", "Columns",
                     "StudyDate", "StudyTime"),
        "chexpert": ("subject_id", "study_id", *FINDINGS),
    }  # fmt: skip

    def write(name: str, rows: Iterator[tuple[Any, ...]]) -> None:
        with gzip.open(get_table_path(root, name), "wt", newline="", compresslevel=4) as file:
            writer = csv.writer(file)
            writer.writerow(header[name])
            writer.writerows(rows)

    dicoms = ["-".join(f"{part:08x}" for part in row) for row in ids.tolist()]
    people = [10_000_000 + 7 * p for p in patient.tolist()]
    numbers, owners = study.tolist(), of_image.tolist()
    write(
        "split", ((d, numbers[i], people[i], "train") for d, i in zip(dicoms, owners, strict=True))
    )
    write(
        "metadata",
        (
            (d, people[i], numbers[i], view, 3056, 2544, date[i], f"{80000 + i % 90000}.25")
            for d, i, view in zip(dicoms, owners, views.tolist(), strict=True)
        ),
    )
    write("chexpert", ((people[i], numbers[i], *label[i]) for i in range(STUDIES)))
    for i in tqdm(range(STUDIES if full else WITH_REPORTS), "reports", disable=None):
        folder = root / f"files/p{str(people[i])[:2]}/p{people[i]}"
        (folder / f"s{numbers[i]}").mkdir(parents=True, exist_ok=True)
        (folder / f"s{numbers[i]}.txt").write_text(_REPORT.format(number=i))
    for dicom, i in zip(dicoms, owners, strict=True) if full else ():
        (root / f"files/p{str(people[i])[:2]}/p{people[i]}/s{numbers[i]}/{dicom}.jpg").touch()


def make_radiograph() -> bytes:
    """A grey JPEG of the most frequent size, with enough detail for 1.5 to 2 MB."""
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (96, 80), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((2544, 3056), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = rng.normal(0, 6, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def process_ours(data: bytes) -> np.ndarray:
    image = load_shades(ImageRef("x.jpg", data=data))
    return pixel_values(image, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)[0]


def build_processor() -> Callable[[bytes], np.ndarray]:
    """transformers' processor as users call it, with an opened image that it converts to RGB."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    made = Qwen2VLImageProcessorPil(size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS})
    return lambda data: made(images=[Image.open(io.BytesIO(data))])["pixel_values"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mimic")
    write_tree(root)
    return root


@pytest.mark.benchmark(timer=time.process_time)
def test_index(benchmark: Any, tree: Path) -> None:
    """All three tables, without a cache."""
    paths = [get_table_path(tree, name) for name in NAMES]
    index = benchmark.pedantic(lambda: mimic_index.build_index(*paths), rounds=2, iterations=1)
    assert (len(index), len(index.dicom)) == (STUDIES, IMAGES)


@pytest.mark.benchmark(timer=time.process_time)
def test_cached_index(benchmark: Any, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree / "cache"))
    open_studies(str(tree))
    source = benchmark.pedantic(lambda: open_studies(str(tree)), rounds=5, iterations=1)
    assert len(source) == STUDIES


@pytest.mark.benchmark(timer=time.process_time, group="image")
@pytest.mark.parametrize("path", ["ours", "transformers"])
def test_image(benchmark: Any, path: str) -> None:
    """One radiograph from JPEG bytes to pixel values."""
    data = make_radiograph()
    run = process_ours if path == "ours" else build_processor()
    values = benchmark.pedantic(run, (data,), rounds=5, iterations=1, warmup_rounds=1)
    assert values.shape[1] == 1176


def time_cpu(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def drop_page_cache() -> bool:
    """Drop the kernel's page cache; returns whether that succeeded."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def print_progress(studies: int, begun: float) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"  {studies} studies with their reports: {time.perf_counter() - begun:.1f} s, "
        f"peak memory {peak:.0f} MiB"
    )


def measure_full_tree(root: Path) -> None:
    """Wall time of index and reports of a full tree, cold and warm, and peak memory."""
    if not Path(get_table_path(root, "chexpert")).exists():
        root.mkdir(parents=True, exist_ok=True)
        write_tree(root, full=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        cold = drop_page_cache()
        begun = time.perf_counter()
        source = open_studies(str(root))
        print(
            f"index of {STUDIES} studies, {'cold' if cold else 'warm'} disk: "
            f"{time.perf_counter() - begun:.1f} s"
        )
        begun, count = time.perf_counter(), 0
        for count, _ in enumerate(source, 1):
            if count == STUDIES // 10:
                print_progress(count, begun)
        print_progress(count, begun)
        cold = drop_page_cache()
        begun = time.perf_counter()
        open_studies(str(root))
        print(
            f"cached index, {'cold' if cold else 'warm'} disk: {time.perf_counter() - begun:.2f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full_tree", type=Path, help="folder of the complete tree")
    args = parser.parse_args()
    if args.full_tree:
        measure_full_tree(args.full_tree)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(root / "cache")
        write_tree(root)
        cold = time_cpu(lambda: open_studies(str(root)))
        cached = statistics.median(time_cpu(lambda: open_studies(str(root))) for _ in range(5))
        size = mimic_index.cache_file(get_table_path(root, "split")).stat().st_size
        print(f"index of {STUDIES} studies, {IMAGES} images: {cold:.2f} s of CPU time")
        print(f"cached index: {cached:.3f} s, {size / 1e6:.0f} MB on disk")
        source = open_studies(str(root))
        read = time_cpu(lambda: list(islice(source, 2000)))
        print(f"studies with reports parsed: {2000 / read:.0f} per second")
    data, process_theirs = make_radiograph(), build_processor()
    assert (process_ours(data) == process_theirs(data)).all()
    pairs = [
        (time_cpu(lambda: process_ours(data)), time_cpu(lambda: process_theirs(data)))
        for _ in range(7)
    ]
    ours, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        f"JPEG of {len(data) / 1e6:.1f} MB to pixel values, per core: ours {1 / ours:.1f}/s, "
        f"transformers {1 / peer:.1f}/s, ratio {peer / ours:.2f}; bit-identical"
    )


if __name__ == "__main__":
    main()
