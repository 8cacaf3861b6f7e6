"""demo/: the page, served on loopback and driven in a real browser, answers as Python does."""

import functools
import io
import os
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from tinycifar.images import read_image
from tinycifar.inference import load_onnx
from tinycifar.paths import CHECKOUT, RESULTS

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
MISSING = {
    "Chromium or Chrome": not BROWSER,
    "npm": not shutil.which("npm"),
    "npm's packages (make site)": not (CHECKOUT / "demo" / "node_modules").is_dir(),
}
pytestmark = pytest.mark.skipif(
    any(MISSING.values()) and not os.environ.get("CI"),  # there it must not be skipped
    reason=f"not here: {', '.join(name for name, missing in MISSING.items() if missing)}",
)

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    # No name is looked up, so that nothing can leave this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    command = ["make", "--silent", "site", f"SITE={site}"]
    subprocess.run(command, cwd=CHECKOUT, check=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER or "chromium", args=FLAGS)
        yield browser
        browser.close()


class Demo:
    """The page in a browser; whatever it asks of another host, and each error, fails the test."""

    def __init__(self, browser, address, **context):
        self.page = browser.new_page(**context)
        self.asked, self.errors = [], []
        self.page.on("request", lambda request: self.asked.append(urlsplit(request.url)))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.goto(address)
        self.wait()

    def wait(self):
        self.page.wait_for_selector("body[aria-busy=false]")

    def open(self, name, content, selector="#file"):
        file = {"name": name, "mimeType": "", "buffer": content}
        self.page.set_input_files(selector, [file])
        self.wait()

    def switch(self, weights):
        self.page.get_by_label(weights).check()
        self.wait()

    @property
    def said(self):
        return self.page.locator("#answer").inner_text()

    @property
    def probabilities(self):
        script = "bars => bars.map(bar => Number(bar.style.getPropertyValue('--p')))"
        return np.array(self.page.eval_on_selector_all("#bars li", script))

    @property
    def pixels(self):
        script = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 32, 32).data]"
        return np.array(self.page.eval_on_selector("#pixels", script)).reshape(32, 32, 4)[..., :3]


@pytest.fixture(scope="module")
def shared(browser, address):
    return Demo(browser, address)


@pytest.fixture
def demo(shared):
    yield shared
    assert {part.hostname for part in shared.asked if part.scheme != "blob"} == {"127.0.0.1"}
    assert not shared.errors


@pytest.fixture(scope="module")
def networks():
    return {
        name: load_onnx(RESULTS / "export" / file)
        for name, file in (("float", "net.onnx"), ("int8", "net-int8.onnx"))
    }


@pytest.fixture(scope="module")
def images(request, tiny):
    """Of CIFAR-10 where it is at hand, else the stand-in's."""
    try:
        return request.getfixturevalue("real").test_images[:20]
    except pytest.skip.Exception:
        return tiny.test_images[:20]


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# What int8 rounds, another processor may round otherwise.
@pytest.mark.parametrize(("weights", "allowed", "n"), [("float", 1e-3, 20), ("int8", 2e-2, 5)])
def test_the_answers_are_pythons(demo, networks, images, weights, allowed, n):
    demo.switch(weights)
    classes, expected = networks[weights].classes, networks[weights](images[:n])
    for i, probabilities in enumerate(expected):
        demo.open(f"{i}.png", encoded(Image.fromarray(images[i])))
        np.testing.assert_array_equal(demo.pixels, images[i])
        np.testing.assert_allclose(demo.probabilities, probabilities, atol=allowed)
        best = demo.probabilities.argmax()
        assert best == probabilities.argmax() or weights == "int8"
        assert demo.said == f"{classes[best]}, {100 * demo.probabilities[best]:.1f} %"
    demo.switch("float")


def photograph(pixels, size, seed):
    """An image of that size with something in it at each scale, as a camera's."""
    rng = np.random.default_rng(seed)
    large = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), np.float32)
    noise = rng.normal(0, 25, large.shape)
    return Image.fromarray((large + noise).clip(0, 255).astype(np.uint8))


def photographs(images):
    turned = Image.Exif()
    turned[0x0112] = 6
    yield "large.jpg", encoded(photograph(images[0], (1600, 1200), 0), "JPEG", exif=turned)
    yield "tall.webp", encoded(photograph(images[1], (333, 777), 1), "WEBP", lossless=True)
    clear = photograph(images[2], (501, 400), 2)
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    yield "clear.png", encoded(clear)
    yield "small.png", encoded(Image.fromarray(images[3]).resize((21, 13)))


def test_larger_images_are_scaled_as_pillow_scales_them(demo, networks, images):
    for name, content in photographs(images):
        expected = read_image(Image.open(io.BytesIO(content)))
        demo.open(name, content)
        assert np.abs(demo.pixels - expected.astype(int)).mean() < 0.5, name
        best = networks["float"](expected[None])[0].argmax()
        assert demo.said.startswith(f"{networks['float'].classes[best]},"), name


def test_the_drawn_images_are_in_the_networks_order_and_recognised(demo, networks):
    for i, name in enumerate(networks["float"].classes):
        demo.page.get_by_role("button", name=f"drawn {name}").click()
        demo.wait()
        assert demo.probabilities.argmax() == i and demo.said.startswith(f"{name},")


def test_a_file_that_is_no_image_gets_a_sentence(demo, images):
    whole = encoded(Image.fromarray(images[0]), "JPEG")
    for name, content in (("notes.txt", b"no image"), ("cut.jpg", whole[:200]), ("empty.png", b"")):
        demo.open(name, content)
        assert demo.said == f"{name} can't be read as an image: try a PNG, JPEG or WebP file."
    demo.open("whole.jpg", whole, "#photo")
    assert "%" in demo.said


@pytest.mark.parametrize(("event", "where"), [("paste", "clipboardData"), ("drop", "dataTransfer")])
def test_an_image_can_be_dropped_and_pasted(demo, images, event, where):
    script = """([event, where, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], event + ".png"));
        const kind = event === "paste" ? ClipboardEvent : DragEvent;
        document.body.dispatchEvent(new kind(event, {bubbles: true, [where]: data}));
    }"""
    content = encoded(Image.fromarray(images[5]))
    demo.page.evaluate(script, [event, where, list(content)])
    demo.wait()
    label = f"{event}.png, scaled to 32 by 32 pixels"
    assert demo.page.get_by_role("img", name=label).count() == 1
    np.testing.assert_array_equal(demo.pixels, images[5])


def test_the_keyboard_is_enough(demo):
    demo.page.locator("#file").focus()
    for key in ("Tab", "Tab", "Enter"):
        demo.page.keyboard.press(key)
    demo.wait()
    assert demo.said.startswith("automobile,")
    assert demo.page.get_by_role("status").inner_text() == demo.said  # what is read out
    for _ in range(9):
        demo.page.keyboard.press("Tab")
    demo.page.keyboard.press("ArrowRight")
    demo.wait()
    assert demo.page.get_by_label("int8").is_checked()
    demo.switch("float")


def test_it_fits_a_phone_and_is_dark_at_night(browser, address):
    size = {"width": 320, "height": 640}
    demo = Demo(browser, address, viewport=size, color_scheme="dark")
    assert demo.page.evaluate("document.documentElement.scrollWidth") == size["width"]
    brightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(demo.page.evaluate(brightness)) < 64
    demo.page.get_by_role("button", name="drawn cat").click()
    demo.wait()
    assert demo.page.locator("#answer").bounding_box()["y"] < size["height"]  # scrolled to
    demo.page.close()


def test_a_network_that_is_not_there_gets_a_sentence(browser, address):
    page = browser.new_page()
    page.route("**/*.onnx", lambda route: route.abort())
    page.goto(address)
    page.wait_for_selector("body[aria-busy=false]")
    assert page.get_by_role("status").inner_text().startswith("The network can't be used (")
    page.close()


def test_the_page_may_ask_no_other_host(demo, address):
    script = "fetch('http://localhost:1/').then(() => 'sent', error => error.name)"
    policy = demo.page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert "http" not in policy and "default-src 'none'" in policy
    asked = len(demo.asked)
    assert demo.page.evaluate(script) == "TypeError"
    assert len(demo.asked) == asked
    assert all("Content Security Policy" in said for said in demo.errors)
    demo.errors.clear()


def test_it_is_small_and_its_pins_name_no_registry():
    program = (CHECKOUT / "demo" / "demo.js").read_text()
    assert program.count("\n") <= 200 and "http" not in program
    lock = (CHECKOUT / "demo" / "package-lock.json").read_text()
    assert "://" not in lock and '"integrity"' in lock
