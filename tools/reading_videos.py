"""What tools/import_videos.py reads, frame by frame: films, folders of images, npz and parquet files.

A film is whatever holds one sequence of frames: a video file, a folder of images, an npz or a parquet file.
"""

import heapq
import io
import math
import re
import zipfile
from functools import cache
from itertools import chain, pairwise
from statistics import median_low
from typing import NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, ImageSequence

FRAME = 64 * 64 * 3  # bytes of a frame in a dataset
FILMS = (
    ".mp4 .webm .gif .mkv .mov .avi .m4v .mpg .mpeg .mts .m2ts .ts .wmv .flv .ogv .3gp "
    ".3g2 .asf .f4v .fli .flc .h264 .h265 .ivf .m2v .mxf .nut .qt .vob .y4m"
).split()
NO_FRAMES = ".bufr .cur .emf .eps .grib .h5 .hdf .icns .ico .ps .wmf".split()  # icons, and stubs of Pillow
SEQUENCES = ("PNG", "WEBP", "AVIF", "TIFF")  # formats that hold several frames in one file
LONGEST_HOLD = 4  # steps of --fps that a frame may stay on the screen; a longer one is a gap
OBSERVATIONS = ("observation", "observations", "obs", "image", "frame")  # columns of parquet files
ENDS = ("done", "terminated", "truncated")


class Frame(NamedTuple):
    number: int  # in its film, from 0; frames that cannot be decoded count
    picture: av.VideoFrame | np.ndarray  # of any size; an array is (H, W, 3) uint8
    begins: bool = False  # frames between this one and the one before are missing


class Steps(NamedTuple):
    """What is known beside the frames of an npz or parquet file."""

    actions: np.ndarray  # (N,) int8, -1: unknown
    rewards: np.ndarray  # (N,) float32, NaN: unknown
    done: np.ndarray | None  # (N,) bool: an episode ends, or begins, here


# ---- What a file is ----


@cache
def image_suffixes():
    """Suffixes of the images that Pillow reads."""
    suffixes = Image.registered_extensions().items()
    readable = {suffix for suffix, name in suffixes if name in Image.OPEN}
    return readable - {*FILMS, *NO_FRAMES}


def kind_of(path):
    """The kind of videos that a file belongs to, or None."""
    suffix = path.suffix.lower()
    if suffix in FILMS:
        return "films"
    if suffix in (".npz", ".parquet"):
        return suffix[1:]
    if suffix in image_suffixes():
        return "images"
    return None


def split_of(path):
    """train or test, where the name of an npz or parquet file or of its folder says so, or None."""
    if path.suffix == ".npz":
        in_place = path.stem.isdecimal() and path.parent.name in ("train", "test")
        return path.parent.name if in_place else None
    for name in (path.name, path.parent.name):
        found = re.match("(train|test)(?![a-z])", name)
        if found:
            return found[1]
    return None


def by_number(path):
    """Sorts 2.png before 10.png."""
    return re.sub(r"\d+", lambda number: number[0].zfill(20), path.name)


# ---- Films ----


def read_film(film, stream, notes):
    """The frames that can be decoded, in the order of their times; notes["lost"] counts the others.

    Each packet has the time of its frame: what a frame overtakes after an error will not come any more. The
    pictures after a loss may be smeared, up to the next key frame, where they jump once more.
    """
    waiting = []  # times of the packets whose frames have not come
    number = 0
    last = -math.inf  # time of the last frame that came
    lost = 0  # frames since then
    error = None  # the last one, until a key frame follows what it lost
    smeared = False
    for packet in packets_of(film, stream, notes):
        if packet.pts is not None:
            heapq.heappush(waiting, packet.pts)
        try:
            pictures = packet.decode()
        except av.FFmpegError as e:
            error = e
            lost += packet.pts is None and packet.size > 0
            continue
        while pictures:
            picture = pictures.pop(0)
            time = last if picture.pts is None else picture.pts
            if error and time < last:
                continue  # too late, as players see it: it is counted as lost
            last = time
            while waiting and waiting[0] <= time:
                lost += heapq.heappop(waiting) < time
            if picture.is_corrupt:
                error = error or ValueError("its frames are damaged")
                lost += 1
                continue
            if not error:
                lost = 0  # packets without a frame of their own, as VP8 has them
            whole = picture.key_frame
            begins = lost > 0 or smeared and whole
            smeared = (lost > 0 or smeared) and not whole
            if begins and whole:
                error = None
            notes["lost"] += lost
            number += lost
            lost = 0
            notes["read"] = number + 1
            yield Frame(number, picture, begins)
            del picture  # the decoder takes its memory for the next one
            number += 1
    if error and not number:
        raise error
    if error:
        lost += len(waiting)
        notes["lost"] += lost
        notes["read"] += lost


def packets_of(film, stream, notes):
    """A film's packets up to its end, or to where its file is broken, and one that empties the decoder."""
    try:
        yield from film.demux(stream)
    except av.FFmpegError:
        if not notes["read"]:
            raise
        notes["broken"] += 1
        last = av.Packet()
        last.stream = stream
        yield last


def every_nth(frames, n):
    """Each frame whose number n divides."""
    begins = False  # a stream, with the next frame that is kept
    for frame in frames:
        begins = begins or frame.begins
        if frame.number % n == 0:
            yield frame._replace(begins=begins)
            begins = False


def at_times(frames, fps, notes):
    """The frame on the screen at each tick of 1/fps seconds; a new stream where one stays there too long."""
    step = 1 / fps
    tolerance = step / 10  # formats round times, some to milliseconds
    begins = False
    tick = None
    for frame, following in pairwise(chain(frames, [None])):
        time = frame.picture.time
        if time is None:
            raise ValueError("its frames have no times: leave out --fps, take --every")
        if tick is None:
            tick = time
        until = time + 2 * tolerance  # the last frame of a stream is there for an instant
        ends = following is None or following.begins
        if not ends:
            hold = (following.picture.time or time) - time
            ends = not 0 <= hold <= LONGEST_HOLD * step
            until = until if ends else following.picture.time
        shown = 0
        while tick < until - tolerance:
            yield frame._replace(begins=begins)
            begins = False
            tick += step
            shown += 1
        notes["repeated"] += max(0, shown - 1)
        if ends:
            begins = True
            tick = None


# ---- Images ----


def read_images(images, files, notes):
    """The frames of a folder's images, of all its files. Numbers that the images' names skip are a gap."""
    missing = find_gaps(images, files)
    notes["missing"] += sum(missing.values())
    number = 0
    for path in images:
        image = Image.open(path)
        pages = ImageSequence.Iterator(image) if image.format in SEQUENCES else [image]
        for i, page in enumerate(pages):
            notes["read"] = number + 1
            yield Frame(number, to_rgb(page), begins=i == 0 and path in missing)
            number += 1


def find_gaps(images, files):
    """{image: how many numbers are missing before it}, in steps of the numbers in the files' names."""
    numbers = sorted({number_of(path) for path in files})
    steps = [b - a for (name, a), (following, b) in pairwise(numbers) if name == following]
    missing = {}
    for path, following in pairwise(images):
        name, a = number_of(path)
        following_name, b = number_of(following)
        if steps and name == following_name:
            n = (b - a) // median_low(steps) - 1
            if n > 0:
                missing[following] = n
    return missing


def number_of(path):
    """The last number in a file's name, after what stands beside it: 'cam1_07.png' -> ('cam1_#', 7)."""
    found = re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem, re.DOTALL)
    if not found:
        return path.stem, 0
    return f"{found[1]}#{found[3]}", int(found[2])


def to_rgb(image):
    """A Pillow image as it is shown, on black where it is transparent: (H, W, 3) uint8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow would clip them at 255
        x = np.asarray(image).astype(np.int64)
        if not 0 <= x.min() <= x.max() < 65536:
            raise ValueError(f"pixels from {x.min()} to {x.max()}: expected 8 or 16 bits")
        image = Image.fromarray(((x + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers: expected 8 or 16 bits")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


# ---- Npz and parquet files ----


def open_npz(path):
    """Of an npz the file obs.npy, at its first row, and its Steps."""
    z = zipfile.ZipFile(path)
    ta = np.lib.format.read_array(z.open("ta.npy"))
    done = np.lib.format.read_array(z.open("done.npy"))
    rewards = np.lib.format.read_array(z.open("rewards.npy"))
    f = z.open("obs.npy")
    np.lib.format.read_magic(f)
    shape, _, dtype = np.lib.format.read_array_header_1_0(f)
    N = len(ta)
    shapes = [shape, ta.shape, done.shape, rewards.shape]
    if shapes != [(N, 64, 64, 3), (N,), (N,), (N,)] or dtype != np.uint8:
        raise ValueError(f"obs {dtype}, ta, done, rewards are {shapes}, not (N, 64, 64, 3) uint8 and (N,)")
    return f, Steps(check_actions(ta), rewards.astype(np.float32), done.astype(bool))


def read_npz(path):
    f, steps = open_npz(path)
    for number in range(len(steps.actions)):
        yield Frame(number, np.frombuffer(f.read(FRAME), dtype=np.uint8).reshape(64, 64, 3))


def check_actions(actions, lowest=0):
    if len(actions) and not lowest <= actions.min() <= actions.max() <= 126:
        raise ValueError(f"actions are {actions.min()} to {actions.max()}, not from 0 to 126")
    return actions.astype(np.int8)


def find_column(names, wanted):
    """The first of the wanted columns that a parquet file has, or None."""
    return next((name for name in wanted if name in names), None)


def parquet_steps(path):
    """The Steps of a parquet file, as far as it has their columns."""
    with open(path, "rb") as f:
        file = pq.ParquetFile(f)
        names = file.schema_arrow.names
        N = file.metadata.num_rows
        actions = np.full(N, -1)
        rewards = np.full(N, np.nan, dtype=np.float32)
        done = None
        if name := find_column(names, ("action", "actions")):
            column = file.read([name])[name]
            if not pa.types.is_integer(column.type):
                raise ValueError(f"column {name} holds {column.type}, not actions from 0 to 126")
            actions = column.cast(pa.int64()).fill_null(-1).to_numpy()
        if name := find_column(names, ("reward", "rewards")):
            rewards = file.read([name])[name].cast(pa.float32()).to_numpy()
        for name in ENDS:
            if name in names:
                column = file.read([name])[name].cast(pa.bool_()).fill_null(False).to_numpy()
                done = column if done is None else done | column
    return Steps(check_actions(actions, lowest=-1), rewards, done)


def read_parquet(path):
    """The frames of a parquet file, a row each, of which 64 are in memory."""
    with open(path, "rb") as f:
        file = pq.ParquetFile(f, buffer_size=2**20, pre_buffer=False)
        names = file.schema_arrow.names
        name = find_column(names, OBSERVATIONS)
        if name is None:
            raise ValueError(f"columns {', '.join(names)}: expected observation, the frames")
        number = 0
        for batch in file.iter_batches(64, columns=[name]):
            for picture in pictures_of(batch.column(0)):
                yield Frame(number, picture)
                number += 1


def pictures_of(column):
    """Each row's picture of an Arrow array: images encoded in bytes, or nested lists of pixels."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_struct(column.type):  # an image of Hugging Face's datasets: bytes and path
        column = column.field("bytes")
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} rows have no picture")
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        for row in column:
            yield to_rgb(Image.open(io.BytesIO(row.as_py())))
    else:
        yield from to_array(column)


def is_list(kind):
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def to_array(column):
    """(N, H, W, 3) uint8 of N nested lists of pixels, whose channels come last or first."""
    shape = [len(column)]
    while is_list(column.type):
        lengths = pc.unique(pc.list_value_length(column))
        if len(lengths) != 1:
            raise ValueError("its pictures, or their rows, have different sizes")
        shape.append(lengths[0].as_py())
        column = column.flatten()
    if len(shape) != 4 or 3 not in (shape[1], shape[3]) or column.null_count:
        raise ValueError(f"pictures of shape {tuple(shape[1:])}: expected (H, W, 3), or encoded images")
    x = column.cast(pa.uint8()).to_numpy(zero_copy_only=False).reshape(shape)
    if shape[3] == 3:
        return x
    return x.transpose(0, 2, 3, 1)


def steps_of(path):
    """The Steps of an npz or parquet file; None for others."""
    if path.suffix == ".npz":
        return open_npz(path)[1]
    if path.suffix == ".parquet":
        return parquet_steps(path)
    return None


# ---- All kinds ----


class Shrinker:
    """A picture of any size as it is shown, cropped, averaged by area -> (64, 64, 3) uint8."""

    def __init__(self, args):
        self.args = args
        self.to_rgba = VideoReformatter()  # a film keeps its tables: up to twice as fast
        self.to_small = VideoReformatter()
        self.rotation = None  # of the last frame, and its display matrix
        self.matrix = None

    def __call__(self, picture):
        size = self.args.size
        if isinstance(picture, av.VideoFrame):
            frame = picture
            if frame.rotation != self.rotation:  # frame.side_data keeps the frame in memory: ask seldom
                self.rotation = frame.rotation
                matrix = frame.side_data.get("DISPLAYMATRIX")
                self.matrix = matrix and np.frombuffer(matrix, dtype=np.int32).tolist()
            if self.args.crop or self.matrix or is_transparent(frame):
                frame = self.crop(self.as_shown(frame))
        else:
            if picture.shape == (size, size, 3) and not self.args.crop:
                return picture
            frame = self.crop(picture)
        small = self.to_small.reformat(frame, size, size, "rgb24", interpolation="AREA", threads=1)
        return small.to_ndarray()

    def as_shown(self, frame):
        """A frame on black where it is transparent, turned and mirrored as its display matrix says."""
        if is_transparent(frame):
            x = self.to_rgba.reformat(frame, format="rgba", threads=1).to_ndarray()
            x = to_rgb(Image.fromarray(x)) if x[..., 3].min() < 255 else x[..., :3]
        else:
            x = self.to_rgba.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
        if not self.matrix:
            return x
        # a pixel at column p and row q is shown at column a p + c q and row b p + d q
        a, b, _, c, d = self.matrix[:5]
        if abs(a) < abs(b):
            x = x.transpose(1, 0, 2)
            a, d = c, b
        if a < 0:
            x = x[:, ::-1]
        if d < 0:
            x = x[::-1]
        return x

    def crop(self, x):
        """The av.VideoFrame of --crop's part of x (H, W, 3)."""
        if self.args.crop:
            left, top, width, height = self.args.crop
            H, W, _ = x.shape
            if not (0 <= left < left + width <= W and 0 <= top < top + height <= H):
                raise ValueError(f"--crop {self.args.crop} is not inside its {W} x {H} pixels")
            x = x[top : top + height, left : left + width]
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(x), format="rgb24")


def is_transparent(frame):
    """Whether a frame's pixels, or its palette, have an alpha channel."""
    channels = frame.format.components
    return frame.format.has_palette or any(channel.is_alpha for channel in channels)


def open_film(path, args, notes):
    """About how many frames a film gives, and an iterator over them, their pictures (64, 64, 3) uint8.

    As they are read, notes gets "read", how many frames a film or folder has; "lost", not decoded; "broken",
    1 where its file ends too early; "missing", skipped by the numbers in names; "repeated", longer on the
    screen than a step of --fps.
    """
    notes.update(read=0, lost=0, broken=0, missing=0, repeated=0)
    rate = None  # frames a second
    if path.suffix == ".npz":
        N = len(open_npz(path)[1].actions)
        frames = read_npz(path)
    elif path.suffix == ".parquet":
        N = len(parquet_steps(path).actions)
        frames = read_parquet(path)
    elif path.is_dir():
        files = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        images = sorted((p for p in files if kind_of(p) == "images"), key=by_number)
        check_names(images)
        N = len(images)
        frames = read_images(images, files, notes)
    else:
        film = av.open(str(path))
        stream = film.streams.best("video")
        if stream is None:
            raise ValueError("no video in it")
        stream.thread_type = "AUTO"  # decodes on all cores
        rate = stream.average_rate
        N = stream.frames or (film.duration or 0) / av.time_base * (rate or 0)
        frames = read_film(film, stream, notes)

    shrink = Shrinker(args)
    if args.fps:
        N = N * args.fps / rate if rate else N
        frames = at_times(frames, args.fps, notes)
    elif args.every > 1:
        N = N / args.every
        frames = every_nth(frames, args.every)
    return int(N), map(lambda frame: frame._replace(picture=shrink(frame.picture)), frames)


def check_names(images):
    """Refuses two images that would be one frame, such as 0.png and 0.jpg."""
    for path, following in pairwise(images):
        if path.stem == following.stem:
            raise ValueError(f"{path.name} and {following.name} are one frame: expected one image of each")
