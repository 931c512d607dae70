"""Sampling points of a segmentation network's backbone, over the whole picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dattrain.cli import main as cli
from dattrain.pretrained import preprocess
from dattrain.visualize.picture import picture_of


def test_points_are_drawn_over_the_whole_picture(tmp_path, capsys, segmenter_file, dense_cfg, scenes):
    file = scenes / "images" / "validation" / "1.png"
    command = ["viz", "points", str(file), "--checkpoint", str(segmenter_file), "--out", str(tmp_path)]
    assert cli.main(command) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"{tmp_path / '1.points.png'}  ") and said.endswith(" %")
    assert (tmp_path / "1.points.png").read_bytes()[1:4] == b"PNG" and (tmp_path / "points.html").is_file()
    # A photograph that lies on its side is the same picture, as for predict.
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned").mkdir()
    with Image.open(file) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned" / "1.png", exif=exif)
    command[2] = str(tmp_path / "turned" / "1.png")
    assert cli.main(command) == 0 and capsys.readouterr().out.splitlines()[0] == said
    height, width = np.asarray(Image.open(file)).shape[:2]
    image = preprocess.read(file)
    assert picture_of(image, dense_cfg).whole
    prepared = preprocess.prepare(image, dense_cfg).shape[1:]
    assert min(prepared) == 64 and max(prepared) == round(64 * max(height, width) / min(height, width))
