"""Which latent action goes with which frame of your films: a table, and a film that shows it.

latents.npz    of every window: film, frame, split, group (n,), z, quantised (n, latent_dim), codes (n, N, H)
latents.csv    the same to read, codes as "3 17 ..."; without z, which has many digits
captions.mp4   with --film: that film as the IDM sees it, each frame with its group and codes under it

A window's latent says what happens from its frame to the next one. `frame` counts from 0 in the film itself:
--every, --fps and frames that cannot be decoded leave gaps. Groups are k-means clusters of the latents, 0 the
largest one.

    python -m tools.export_latents --env-id my_videos
    python -m tools.export_latents --env-id my_videos --film holiday/beach.mp4
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import tyro
from PIL import Image, ImageDraw

from lapo_bc import load_checkpoint, load_dataset, refuse
from lapo_decode import load_labels
from tools.inspect_latents import group_latents
from tools.loading import describe, encode, find_device, load_lapo, open_folder, stage_folder, write_results


@dataclass
class Args:
    env_id: str = "my_videos"  # the dataset's name
    exp_name: str = Path(__file__).stem  # the run folder is RUNS_DIR/ENV_ID__EXP_NAME__SEED
    seed: int = 1  # seed of the runs
    data_dir: str | None = None  # the dataset; default data/ENV_ID
    pretrain_checkpoint: str | None = None  # default: RUNS_DIR/ENV_ID__lapo_pretrain__SEED/checkpoint.pt
    num_groups: int = 8  # k-means groups of the latents
    film: str | None = None  # the film to write with captions, by its name in latents.csv
    runs_dir: str = "runs"  # where run folders are made
    overwrite: bool = False  # replace a finished run
    cuda: bool = True  # use CUDA, or another accelerator that torch knows, where there is one


def places(data, splits):
    """The film and the frame of every row of the splits' Frames: [(names (N,), t (N,))].

    A film whose end is the test split goes on there. A dataset that was played is one film a split.
    """
    found = []
    for split, frames in zip(("train", "test"), splits):
        films = data["splits"][split].get("films") or {split: len(frames.first)}
        numbers = load_labels(frames, "frame")
        if numbers is None:
            numbers = np.arange(len(frames.first))
        found.append((np.repeat(list(films), list(films.values())), numbers))
    return found


def write_table(path, columns):
    """A CSV file of columns {name: (n, ...)}; a row of several numbers is one cell."""
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        for row in zip(*columns.values()):
            writer.writerow(" ".join(map(str, np.ravel(cell))) for cell in row)


def caption(columns, i):
    """What stands under the frame of the table's row i."""
    text = f"group {columns['group'][i]}"
    if "codes" in columns:
        codes = columns["codes"][i].ravel()
        text = f"{text}, codes {' '.join(map(str, codes))}"
    return text


def write_captions(path, pictures, captions):
    """A film of pictures (T, 64, 64, 3), four times as large, with a line of text under each; 10 a second."""
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 256, 288, "yuv420p"
        for picture, caption in zip(pictures, captions):
            page = Image.new("RGB", (256, 288))
            page.paste(Image.fromarray(picture).resize((256, 256), Image.NEAREST))
            ImageDraw.Draw(page).text((4, 264), caption, fill="white")
            film.mux(stream.encode(av.VideoFrame.from_image(page)))
        film.mux(stream.encode(None))


def main(args):
    began = time.time()
    device = find_device(args.cuda)
    path = args.pretrain_checkpoint or stage_folder(args, "lapo_pretrain") / "checkpoint.pt"
    lapo = load_lapo(load_checkpoint(path, "lapo_pretrain", args.env_id), device)
    data, *splits = load_dataset(args)
    film_of = places(data, splits)
    films = {name for names, _ in film_of for name in names}
    if args.film is not None and args.film not in films:
        refuse(f"--film {args.film} is none of {', '.join(sorted(films)[:5])} … of the dataset's meta.json")
    folder = open_folder(args)
    folder.mkdir(parents=True, exist_ok=True)

    parts = []
    for split, frames, (names, numbers) in zip(("train", "test"), splits, film_of):
        t = frames.windows
        found = encode(lapo, frames, t, device)
        columns = {"film": names[t], "frame": numbers[t], "split": np.full(len(t), split)}
        columns |= {"z": found.z, "quantised": found.quantised}
        if found.codes is not None:
            columns["codes"] = found.codes
        parts.append(columns)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    columns["group"], _ = group_latents(columns["quantised"], args.num_groups, args.seed)
    np.savez_compressed(folder / "latents.npz", **columns)
    readable = dict(columns)
    for name in ("z", "quantised"):
        del readable[name]
    write_table(folder / "latents.csv", readable)

    if args.film is not None:
        pictures = []
        lines = []
        i = 0  # the table's next row
        for frames, (names, _) in zip(splits, film_of):
            windows = set(frames.windows)
            for t, name in enumerate(names):
                if name == args.film:
                    pictures.append(frames[t])
                    lines.append(caption(columns, i) if t in windows else "no window")
                i += t in windows
        write_captions(folder / "captions.mp4", pictures, lines)
    write_results(folder, began, {**describe(args, "export_latents"), "windows": len(columns["group"])})
    print(f"wrote {folder}: {len(columns['group']):,} windows of {len(films)} films")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
