"""The index of one shard that others wrote, made by reading tar headers alone (whole sets: ``prepare.index_shards``).

Layouts: a sample is the consecutive members of one key (the name up to the first dot of its last part); its image is
the member with an image's extension; its label stands in ``.cls``, or in a field of ``.json``. ``--image`` and
``--label`` name others. Its annotation is a map (``.seg.png``, or a ``.png`` of numbers beside an image of another format), or objects
in ``.json`` where that holds no label. Members that no sample has are counted by kind.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from dattrain.data.annotations import instances, maps
from dattrain.data.annotations.semantic import annotated_size
from dattrain.data.decode import images as image_bytes
from dattrain.data.decode.images import IMAGE_EXTENSIONS
from dattrain.data.label_values import LABEL_FIELDS, as_label, label_of, parse_json
from dattrain.data.source import inventory, tar
from dattrain.data.source.annotation_index import AnnotationIndex, Annotations
from dattrain.data.source.files import explained, open_file, sha256_of
from dattrain.data.source.index import NO_LABEL, LeftOut, ShardIndex, leave_out
from dattrain.errors import UserError

MAP_EXTENSION = "seg.png"
"""Of a map whose image may be a PNG too."""
_REASONS_KEPT = 10
_HEADER = 64 * 1024
"""Bytes of an image that hold its size, but where EXIF is longer."""
_TEXT_LIMIT, _JSON_LIMIT = 4096, 64 << 20
"""Bytes of a .cls and of a .json; larger ones hold something else."""


def build(
    path: str,
    *,
    checksum: bool = False,
    image: str | None = None,
    label: str | None = None,
    unterminated: bool = False,
) -> ShardIndex:
    """The index of one local shard.

    Args:
        checksum: also compute the SHA-256, which reads every byte.
        image: extension of the image's member (``jpg``, ``input.jpg``); None takes the one with an image's extension.
        label: field of ``.json`` that holds the label, or extension of the member that does (``output.cls``); None takes
            ``.cls``, else the first of label, cls, class_id.
        unterminated: accept a tar without its end marker.

    Raises:
        UserError: an incomplete tar; a sample with two images, or a label that is no number; labels and annotations, or
            annotations of two kinds; a member's name that is not to be trusted.
    """
    with explained(path), open(open_file(path), "rb", buffering=0) as file:
        index = _Builder(path, file.fileno(), image, label).index(unterminated)
        # Of the file that was indexed, whatever has its name by now.
        return replace(index, sha256=sha256_of(file.fileno())) if checksum else index


class _Builder:
    def __init__(self, path: str, fd: int, image: str | None, label: str | None) -> None:
        self.path, self.fd = path, fd
        self.image = image.lower().lstrip(".") if image else None
        self.label = label
        self.left_out: dict[str, LeftOut] = {}
        self.why: dict[str, str] = {}
        self.kinds: dict[Annotations, str] = {}

    def index(self, unterminated: bool) -> ShardIndex:
        path = self.path
        offsets, lengths, labels, linked = [], [], [], []
        keys: list[str] = []
        annotations: list[tuple[int, int, int, int]] = []
        seen: set[str] = set()
        for key, members in self._samples(tar.scan(path, unterminated=unterminated)):
            if key in seen:
                raise UserError(
                    f"{path}: sample {key!r} comes twice, the second time at offset {members[0].offset}; its members "
                    "must stand together (`tar --sort=name` writes them so), and keys, which end at the first dot, must be "
                    "unique within a shard"
                )
            seen.add(key)
            image, annotation = self._image(key, members)
            label = NO_LABEL
            if annotation is None:
                label, annotation = self._label(key, members)
            if image is not None and image.kind == tar.HARD_LINK:
                linked.append(len(keys))
            offsets.append(image.offset if image else 0)
            lengths.append(image.size if image else 0)
            labels.append(label)
            keys.append(key)
            place = (annotation.offset, annotation.size) if annotation else (0, 0)
            annotations.append((*place, *self._size(image, annotation)))
        self._check_kinds(labels, keys)
        if not keys and self.left_out:
            raise UserError(
                inventory.no_shard_message(path)
                or f"{path}: a tar without samples; it holds {describe(self.left_out.values())}"
            )
        if all(label == NO_LABEL for label in labels) and (advice := inventory.no_shard_message(path)):
            raise UserError(advice)
        return ShardIndex.build(
            offsets,
            lengths,
            labels,
            keys,
            size=os.fstat(self.fd).st_size,
            linked=linked,
            left_out=self.left_out.values(),
            why=self.why,
            annotated=AnnotationIndex.build(next(iter(self.kinds)), annotations) if self.kinds else None,
        )

    def _check_kinds(self, labels: list[int], keys: list[str]) -> None:
        """Raise UserError where annotations are of two kinds, or some samples have a label instead."""
        found: list[tuple[str, str]] = list(self.kinds.items())
        found += [("a label", key) for key, label in zip(keys, labels) if label != NO_LABEL][:1]
        if self.kinds and len(found) > 1:
            (one, first), (two, second) = found[:2]
            raise UserError(
                f"{self.path}: sample {first!r} has {one}, and sample {second!r} has {two}; the samples of a set hold one kind of "
                "annotations, or labels: write them into shards of their own"
            )

    def _samples(self, members: Iterable[tar.Member]) -> Iterator[tuple[str, list[tar.Member]]]:
        key, group = None, []
        for member in members:
            its, extension = tar.split_name(member.name)
            if os.path.basename(its) == "":
                continue  # hidden files, as AppleDouble's
            if not extension:
                kind = "without extension" if member.readable else member.kind
                leave_out(self.left_out, kind, member.name, lost=False)
                continue
            if its != key and key is not None:
                yield key, group
                group = []
            key = its
            group.append(member)
        if key is not None:
            yield key, group

    def _image(self, key: str, members: list[tar.Member]) -> tuple[tar.Member | None, tar.Member | None]:
        """The image of a sample, and the map beside it."""

        def wanted(member: tar.Member) -> bool:
            extension = tar.split_name(member.name)[1].lower()
            if self.image is not None:
                return extension == self.image
            return extension.rpartition(".")[2] in IMAGE_EXTENSIONS

        candidates = [m for m in members if wanted(m)]
        images = [m for m in candidates if m.readable]
        beside = self._map(key, members, images)
        images = [m for m in images if m is not beside]
        if len(images) > 1:
            raise UserError(
                f"{self.path}: sample {key!r} at offset {images[0].offset} has {len(images)} images "
                f"({', '.join(os.path.basename(m.name) for m in images)}); it must have one, and where it has no label at most a map of "
                "class numbers (.seg.png, or a .png of one channel of 8 bits) beside. Keys end at the first dot; `--image EXTENSION` says which of a sample's "
                "images to take"
            )
        if beside is not None:
            self.kinds.setdefault("maps", key)
        for member in members:
            extension = tar.split_name(member.name)[1].lower()
            if not member.readable:
                read = member in candidates or extension in ("cls", "json")
                leave_out(self.left_out, member.kind, member.name, lost=read)
            elif (
                member not in (*images, beside)
                and extension not in ("cls", "json")
                and not self._holds_label(extension)
            ):
                unread_picture = not images and extension.rpartition(".")[2] in UNREAD_PICTURES
                leave_out(self.left_out, f".{extension}", member.name, lost=unread_picture)
        if not images:
            self._note(key, members)
        return images[0] if images else None, beside

    def _map(self, key: str, members: list[tar.Member], images: list[tar.Member]) -> tar.Member | None:
        """The map of the classes of a sample's pixels; None where it has none."""
        by_extension = {tar.split_name(m.name)[1].lower(): m for m in members if m.readable}
        if self.label is not None or "cls" in by_extension:
            return None  # what has a label is a sample of classes, whatever lies beside its image
        for extension in (MAP_EXTENSION, "png"):
            found = by_extension.get(extension)
            if found is not None and (extension == MAP_EXTENSION or [m for m in images if m is not found]):
                head = maps.header(os.pread(self.fd, min(found.size, 64), found.offset))
                if head is not None and head.holds_numbers:
                    return None if self._json_label(key, by_extension) else found
        return None

    def _json_label(self, key: str, by_extension: Mapping[str, tar.Member]) -> bool:
        """Whether a sample's ``.json`` holds a label."""
        if "json" not in by_extension:
            return False
        content, where = self._json(key, by_extension["json"])
        return label_of(content, LABEL_FIELDS, where)[0] is not None

    def _json(self, key: str, member: tar.Member) -> tuple[Any, str]:
        """The content of a sample's ``.json``, and where it is. Raises UserError."""
        where = f"{self.path}: sample {key!r} at offset {member.offset}"
        if member.size > _JSON_LIMIT:
            raise UserError(f"{where}: its .json has {member.size:,} bytes; it should hold a few fields")
        return parse_json(os.pread(self.fd, member.size, member.offset), where), where

    def _size(self, image: tar.Member | None, annotation: tar.Member | None) -> tuple[int, int]:
        """Height and width of an annotated image as it is read, which is turned where its annotation is; zeros where its header cannot be read."""
        if image is None or annotation is None:
            return 0, 0
        for limit in (_HEADER, image.size):
            try:
                stored = image_bytes.size(os.pread(self.fd, min(image.size, limit), image.offset))
                break
            except image_bytes.BadImage:  # its header may lie beyond what was read
                continue
        else:
            return 0, 0
        if stored[0] == stored[1]:
            return stored
        said = os.pread(self.fd, min(annotation.size, 64), annotation.offset)
        if maps.header(said) is None:  # of a map its first bytes tell
            said = os.pread(self.fd, annotation.size, annotation.offset)
        size = annotated_size(said)
        return size if size == stored[::-1] else stored

    def _label(self, key: str, members: list[tar.Member]) -> tuple[int, tar.Member | None]:
        """The label of a sample, or the member that holds its objects instead."""
        by_extension = {tar.split_name(m.name)[1].lower(): m for m in members if m.readable}
        where = f"{self.path}: sample {key!r}"
        text = next((x for x in by_extension if _is_text(x) and self._holds_label(x)), None)
        if text is not None:
            member = by_extension[text]
            where = f"{where} at offset {member.offset}"
            content = os.pread(self.fd, min(member.size, _TEXT_LIMIT), member.offset)
            label = as_label(content.decode("utf-8", "replace"), where)
            if label is None or member.size > _TEXT_LIMIT:
                raise UserError(f"{where}: its .{text} holds {content[:40]!r}, not a number")
            return label, None
        field = None if self.label is None or _is_text(self.label) else self.label
        if "json" not in by_extension or (self.label is not None and field is None):
            self._note(key, members)
            return NO_LABEL, None
        member = by_extension["json"]
        content, where = self._json(key, member)
        label, seen = label_of(content, (field,) if field else LABEL_FIELDS, where)
        if label is not None:
            return label, None
        if instances.is_annotation(content) and field is None:
            self.kinds.setdefault("instances", key)
            return NO_LABEL, member
        if field:
            raise UserError(
                f"{where}: its .json has no integer field {field!r}" + (f", but {seen}" if seen else "")
            )
        none = f"none of {', '.join(LABEL_FIELDS)}"
        self._note(key, members, f"its .json has {f'{seen}, not a number' if seen else none}")
        return NO_LABEL, None

    def _holds_label(self, extension: str) -> bool:
        """Whether members of this extension are read for a label."""
        if self.label is not None and _is_text(self.label):
            return extension == self.label.lower().lstrip(".")
        return extension == "json" or (self.label is None and extension == "cls")

    def _note(self, key: str, members: list[tar.Member], why: str | None = None) -> None:
        """Keep why a sample lacks something, of the first ones."""
        if key in self.why or len(self.why) >= _REASONS_KEPT:
            return
        if why is None:
            kinds = [os.path.basename(m.name) + ("" if m.readable else f", a {m.kind}") for m in members[:4]]
            why = f"it has {'; '.join(kinds)}"
            if any("." in tar.split_name(m.name)[1] for m in members):
                why += "; keys end at the first dot"
            if "/" in key and not any(tar.split_name(m.name)[1].lower() in ("cls", "json") for m in members):
                why += "; where its folder is its class, extract the tar and pack the folder"
        self.why[key] = why


UNREAD_PICTURES = frozenset(["heic", "heif", "jxl", "svg", "tga", "ico", "psd", "raw"])
"""Extensions of pictures that are not read."""


def describe(left_out: Iterable[LeftOut]) -> str:
    """``1 .avif (x.avif), 2 symbolic link (y.jpg, ...)``; the same kind of several shards is counted together."""
    kinds: dict[str, LeftOut] = {}
    for some in left_out:
        leave_out(kinds, some.kind, some.first, lost=some.lost, count=some.count)
    return ", ".join(
        f"{some.count:,} {some.kind} ({some.first}{', ...' if some.count > 1 else ''})"
        for some in sorted(kinds.values(), key=lambda some: some.kind)
    )


def _is_text(label: str) -> bool:
    """Whether ``--label`` names a member that holds the number, and not a field of ``.json``."""
    return label.lower().lstrip(".") == "cls" or label.lower().endswith(".cls")
