"""Take a picture of a page in a file: `python docs/screenshots/report_page.py PAGE.html OUT.png --size 1280x1500`.

Needs chromium; not part of CI.
"""

import argparse
from pathlib import Path

from browser import Browser
from PIL import Image


def main() -> None:
    """Parse the command line and take one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="HTML file")
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument("--size", default="1280x1500", help="WIDTHxHEIGHT in CSS pixels, from the top of the page")
    arguments = parser.parse_args()
    width, height = (int(part) for part in arguments.size.split("x"))
    with Browser(width, height) as browser:
        browser.open(arguments.page.resolve().as_uri())
        browser.wait_for("document.readyState === 'complete' && document.images.length > 0", timeout_s=30)
        browser.save(arguments.output)
    with Image.open(arguments.output) as picture:  # text and curves have few colours: a palette takes half the bytes
        picture.convert("RGB").quantize(128).save(arguments.output, optimize=True)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
