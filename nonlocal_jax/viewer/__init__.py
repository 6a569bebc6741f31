"""What web pages of a network share, the viewer's script and style, and the page for browsers."""

from pathlib import Path

STATIC = Path(__file__).parent / 'static'  # viewer.js and viewer.css
BROWSER = Path(__file__).parent / 'browser'  # the page that `export.page` completes
