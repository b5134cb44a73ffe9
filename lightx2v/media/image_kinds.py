"""What a file is by its content, whatever its name says: a kind of picture that can be read, or words for a message."""

import re

_CONVERT = "Convert it to JPEG or PNG."
_EXPORT = "Export it as PNG."
_ONE_FRAME = "Save one frame of it as JPEG or PNG."
_PICTURE_ITSELF = "Give the picture itself."
_AGAIN = "Copy or download it again."

_READABLE = (("JPEG", rb"\xff\xd8\xff"), ("PNG", rb"\x89PNG\r\n\x1a\n"), ("WEBP", rb"RIFF.{4}WEBP"))
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_HEIF_BRANDS = {b"mif1", b"mif2", b"msf1", b"miaf"}
"""Of the `ftyp` box. Files of all three kinds share the container, and most name the last brands besides their own."""

_TEXT = rb"(?:\xef\xbb\xbf)?\s*"
_OTHERS = (
    (rb"GIF8[79]a", "a GIF picture", _CONVERT),
    (rb"BM.{4}\0{4}", "a BMP picture", _CONVERT),
    (rb".{4}ftypcrx |II\*\0.{4}CR|FUJIFILMCCD-RAW|II(RO|RS|U\0)|MMOR|\0MRM", "a camera's raw picture", _CONVERT),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF picture or a camera's raw one", _CONVERT),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture", _CONVERT),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture", _CONVERT),
    (rb"II\xbc", "a JPEG XR picture", _CONVERT),
    (rb"\xff\xd8", "the beginning of a JPEG picture", _AGAIN),
    (rb"[\x8a\x8b][MJ]NG\r", "an MNG or JNG picture", _CONVERT),
    (rb"8BP[SB]", "a Photoshop picture", _EXPORT),
    (rb"gimp xcf", "a GIMP picture", _EXPORT),
    (rb"\0\0[\x01\x02]\0[^\0]\0", "an icon (ICO)", _CONVERT),
    (rb"icns", "an icon (ICNS)", _CONVERT),
    (rb"P[1-7]\s+(#|\d|WIDTH)", "a PNM picture", _CONVERT),
    (rb"DDS ", "a DDS texture", _CONVERT),
    (rb"v/1\x01", "an OpenEXR picture", _CONVERT),
    (rb"#\?R(ADIANC|GB)E", "a Radiance HDR picture", _CONVERT),
    (rb"qoif", "a QOI picture", _CONVERT),
    (rb"FLIF", "a FLIF picture", _CONVERT),
    (rb"SIMPLE  =", "a FITS picture", _CONVERT),
    (rb".{128}DICM", "a DICOM picture", _CONVERT),
    (rb"\x0a[\0-\x05]\x01[\x01\x02\x04\x08]", "a PCX picture", _CONVERT),
    (rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", "a Windows metafile", _EXPORT),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file", _EXPORT),
    (_TEXT + rb"%PDF-", "a PDF document", _EXPORT),
    (
        _TEXT + rb"(?i:<(!doctype\s+html|html|head|body|title|script|meta)\b)",
        "a web page",
        "Save the picture that it shows.",
    ),
    (_TEXT + rb"(?i:<(svg\b|(\?xml|!--|!doctype\s+svg).{0,4000}?<svg\b))", "an SVG drawing", _EXPORT),
    (_TEXT + rb"<\?xml", "an XML text", _PICTURE_ITSELF),
    (_TEXT + rb"version https://git-lfs", "a Git LFS pointer, which stands for the picture", "Run git lfs pull."),
    (_TEXT + rb"#EXTM3U", "a playlist", _PICTURE_ITSELF),
    (rb"\x1a\x45\xdf\xa3", "a video (WebM or Matroska)", _ONE_FRAME),
    (rb"RIFF.{4}AVI |\0\0\x01[\xba\xb3]|FLV\x01|\x30\x26\xb2\x75|G.{187}G", "a video", _ONE_FRAME),
    (rb".{4}ftypqt  |\0.{3}(moov|mdat|wide|pnot)", "a video (QuickTime)", _ONE_FRAME),
    (rb".{4}ftypM4[AB] |RIFF.{4}WAVE|OggS|ID3|fLaC|\xff[\xe3\xf1-\xf3\xf9-\xfb]", "a sound file", _PICTURE_ITSELF),
    (rb".{4}ftyp", "a video (MP4)", _ONE_FRAME),
    (
        rb"PK\x03\x04|Rar!|7z\xbc\xaf|\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd",
        "an archive or a document",
        _PICTURE_ITSELF,
    ),
    (rb"\0\x05\x16[\0\x07]", "a side file of macOS (._NAME)", "Give the file of that name without ._ in front."),
    (rb"\0+\Z", "nothing but zeros", _AGAIN),
    (rb"\Z", "empty", _AGAIN),
    (rb"[\t\n\r -~\x80-\xff]+\Z", "a text", _PICTURE_ITSELF),
    (rb"", "of a kind that is not known", _CONVERT),
)
"""What a file begins with, its name in a message, and what to do with it. The first match counts; the last one always
matches."""


def readable_kind(data: bytes) -> str | None:
    """JPEG, PNG, WEBP, AVIF or HEIF (which HEIC is too), as Pillow calls them; None for anything else."""
    brands = _brands(data)
    if brands & _AVIF_BRANDS:
        return "AVIF"
    if brands & (_HEIC_BRANDS | _HEIF_BRANDS):
        return "HEIF"
    return next((kind for kind, start in _READABLE if re.match(start, data, re.DOTALL)), None)


def describe(data: bytes) -> tuple[str, str]:
    """("a GIF picture", "Convert it to JPEG or PNG."): what a file is that cannot be read, and what to do with it."""
    brands = _brands(data)
    if brands & _AVIF_BRANDS:
        return "an AVIF picture", "Convert it to JPEG or PNG, or install a Pillow with AVIF: pip install -U pillow."
    if brands & (_HEIC_BRANDS | _HEIF_BRANDS):
        name = "a HEIC picture, as phones make them" if brands & _HEIC_BRANDS else "a HEIF picture"
        return name, "Convert it to JPEG or PNG, or install pillow-heif: pip install pillow-heif."
    head = data[:4096]
    return next((name, advice) for start, name, advice in _OTHERS if re.match(start, head, re.DOTALL))


def _brands(data: bytes) -> set[bytes]:
    """The major brand and the compatible ones of a file in ISO boxes; none of any other file, nor of Canon's CR3."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
