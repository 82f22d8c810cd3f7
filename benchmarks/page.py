"""Open a run's report.html in Chromium without a screen, and take a picture of it.

    make demo
    VENV=.venv-page ./setup.sh benchmarks/page.txt
    .venv-page/bin/python benchmarks/page.py output/demo/report.html docs/report.png

Fails if the page asks for anything but itself, writes to the browser's console, or is as bright on a dark screen as on a
light one. Prints what was seen.
"""

import argparse
import os
import pathlib
import subprocess
import sys

WIDTH, HEIGHT = 1100, 1280  # pixels: from the title to the curves
LOOK = """
import sys
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor, qWebEngineChromiumVersion
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

page_file, picture, width, height = sys.argv[1:5]
requests, messages = [], []

class Requests(QWebEngineUrlRequestInterceptor):
    def interceptRequest(self, request):
        requests.append(request.requestUrl().toString())

class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        messages.append(message)

def look():
    image = view.grab().toImage()
    image.save(picture)
    print(qWebEngineChromiumVersion(), len(requests), len(messages), image.pixelColor(5, 5).lightness())
    application.quit()

application = QApplication(sys.argv)
profile, interceptor = QWebEngineProfile(), Requests()
profile.setUrlRequestInterceptor(interceptor)
page, view = Page(profile), QWebEngineView()
view.setPage(page)
view.resize(int(width), int(height))
view.show()
page.loadFinished.connect(lambda loaded: QTimer.singleShot(1500, look if loaded else application.quit))  # painted by then
page.load(QUrl.fromLocalFile(page_file))
application.exec()
"""


def look(page: pathlib.Path, picture: pathlib.Path, dark: bool) -> tuple[str, int, int, int]:
    """Return (version of Chromium, requests, console messages, lightness of the page from 0 to 255)."""
    flags = f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={0 if dark else 1}"
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": flags}
    words = [sys.executable, "-c", LOOK, page.resolve(), picture.resolve(), WIDTH, HEIGHT]
    done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, timeout=120)
    seen = done.stdout.split()
    if len(seen) != 4:
        raise SystemExit(f"{page} was not shown: {done.stderr[-2000:]}")
    return seen[0], *map(int, seen[1:])


def main() -> None:
    """Look at the page in the light and in the dark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=pathlib.Path, help="report.html of a run")
    parser.add_argument("picture", type=pathlib.Path, help="PNG file to write; the dark one is left beside the page")
    args = parser.parse_args()
    pictures = {False: args.picture, True: args.page.with_name("report-dark.png")}
    seen = {dark: look(args.page, picture, dark) for dark, picture in pictures.items()}
    for dark, (version, requests, messages, lightness) in seen.items():
        scheme = "dark" if dark else "light"
        print(f"Chromium {version}, {scheme}: {requests} request, {messages} console messages, lightness {lightness}")
        if requests != 1 or messages:
            raise SystemExit(f"{args.page} needs more than itself, or is not sound")
    if not seen[True][3] < 100 < 200 < seen[False][3]:
        raise SystemExit(f"{args.page} does not follow the colours of the system")


if __name__ == "__main__":
    main()
