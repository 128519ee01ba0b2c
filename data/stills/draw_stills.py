"""Draw the bundled stills, `lighthouse.png` (960x640) and `tower.png` (640x960), beside this script.

Every shape is written down or follows from a formula, so anyone can draw the same pictures again. With --check they
are only compared with the files; one level (of 255) is forgiven, as processors may round a sine differently.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw

HERE, SCALE = Path(__file__).resolve().parent, 3  # SCALE: samples per output pixel, along each axis
PUFFS = ((-0.42, 0.1), (-0.25, 0.17), (-0.05, 0.24), (0.17, 0.19), (0.34, 0.12), (0.48, 0.07))  # of a cloud


class Canvas:
    """A supersampled picture, measured in output pixels, y downwards.

    Layers are `shapes | fill | alpha`, `;` between; shapes, `,` between: ovals `o cx cy rx ry`, boxes `r x0 y0 x1 y1`,
    polygons `p x y x y ...`; or a glow `g cx cy radius`. Fills: one colour, or a ramp `y value colour value colour ...`.
    """

    def __init__(self, width: int, height: int) -> None:
        self.x, self.y = np.meshgrid(*((np.arange(n * SCALE, dtype=np.float32) + 0.5) / SCALE for n in (width, height)))
        self.pixels = np.zeros((*self.x.shape, 3), dtype=np.float32)

    def mask(self, shapes: str) -> np.ndarray:
        pen = ImageDraw.Draw(image := Image.new("1", self.x.shape[::-1]))
        for kind, *words in map(str.split, shapes.split(",")):
            a, b, c, *d = at = [float(word) for word in words]
            if kind == "g":
                return np.clip(1 - ((self.x - a) ** 2 + (self.y - b) ** 2) / c**2, 0, 1) ** 3
            at = [a - c, b - d[0], a + c, b + d[0]] if kind == "o" else at
            {"o": pen.ellipse, "r": pen.rectangle, "p": pen.polygon}[kind]([round(v * SCALE) for v in at], fill=1)
        return np.asarray(image)

    def paint(self, mask: np.ndarray, fill: str, alpha: float = 1.0, along: np.ndarray | None = None) -> None:
        rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        along = (along if along is not None else self.x if fill[0] == "x" else self.y)[box]
        stops = f"0 {fill}".split() if fill[0] == "#" else fill.strip("xy").split()
        at, colours = [float(v) for v in stops[::2]], zip(*map(ImageColor.getrgb, stops[1::2]), strict=True)
        colour = np.stack([np.interp(along, at, channel).astype(np.float32) for channel in colours], axis=-1)
        self.pixels[box] += (alpha * mask[box].astype(np.float32))[..., None] * (colour - self.pixels[box])

    def draw(self, layers: str) -> None:
        for shapes, fill, *alpha in (layer.split("|") for layer in layers.split(";")):
            self.paint(self.mask(shapes), fill.strip(), *map(float, alpha))

    def clouds(self, top: str, base: str, *clouds: tuple[int, int, int]) -> None:
        for cx, cy, width in clouds:
            puffs = ",".join(f"o {cx + width * t} {cy} {width * r} {width * r * 0.36}" for t, r in PUFFS)
            body = self.mask(f"{puffs}, o {cx} {cy} {width * 0.7} 5") & (self.y < cy + 3)
            self.paint(body, f"y {cy - width * 0.09} {top} {cy + 4} {base}", 0.68)


def lighthouse(c: Canvas) -> None:
    x, y, sin, clip = c.x, c.y, np.sin, np.clip
    stars = ",".join(f"o {i * i * 97 % 953} {i**3 * 57 % 191} {1 - i % 5 / 9} {1 - i % 5 / 9}" for i in range(1, 80))
    c.draw(f"""r 0 0 960 640 | y 0 #1b2150 140 #4a3f80 255 #a9588c 335 #f08c70 395 #ffd690; {stars} | #fff4dc | .8;
        g 300 385 420 | #f58a86 | .5; g 300 385 230 | #ffdc98 | .85; o 300 378 46 46 | y 332 #fff8de 400 #ffd98a;
        r 0 395 960 640 | y 395 #ffc588 425 #cf7f8c 490 #6c5694 570 #37396f""")
    c.clouds("#6d4a86", "#ffb18a", (120, 215, 250), (400, 150, 300), (880, 262, 260), (350, 290, 170), (60, 322, 150))
    c.paint((y < 395) & (y > 395 - clip(x / 11 - 38, 0, 42) * (1 + 0.4 * sin(x / 41))), "y 345 #d08088 395 #8a5d8a")
    for i in range(34):  # the sun on the water
        c.draw(f"o {300 + (18 + i) * sin(i * 2.4)} {398 + 4 * i} {46 - i + 12 * sin(i * 1.7)} {1 + i / 30} | #f6d3a2")
    top = 424 + 60 * clip((640 - x) / 140, 0, 1) ** 2 - 16 * clip((x - 740) / 220, 0, 1) + 2 * sin(x / 19)
    land = (y > top) & (x > 520 - 0.42 * (y - 460) + 9 * np.abs(sin(y / 13)) + 5 * sin(y / 5))
    c.paint(land, "700 #d98a7c 790 #8b5a78 920 #54406e 1200 #3a3160", along=x + 0.5 * y)
    for u, v, w in ((540 + 48 * i, 470 + 14 * sin(i * 2.1), 20 + 6 * sin(i * 1.3)) for i in range(9)):
        c.draw(f"p {u} {v} {u + w} {v + 16} {u + w / 2} 600 {u - w} 600 {u - w / 3} {v + 40} | #2b2652 | .4")
    c.paint(land & (y < top + 17 + 7 * np.abs(sin(x / 17))), "x 500 #d9a878 620 #93916a 760 #56706a 960 #33505f")
    for i, level in enumerate((430, 456, 490, 545, 594)):  # waves: three behind the land, two before it
        run, seen = x / (30 + 15 * i), ~land | (i > 2)
        depth = y - level - (3 + 2.4 * i) * (np.abs(sin(run + 1.9 * i)) ** 0.9 * 1.5 - 1 + 0.6 * sin(run / 2.3 + i))
        veil, foam = (seen * (depth > 0) * np.exp(-np.maximum(depth, 0) / d) for d in (12 + 14 * i, 0.9 + 0.3 * i))
        c.paint(depth > 0 if i > 2 else 0.85 * veil, "y 430 #b9718f 490 #5f529a 560 #39407f 640 #1f2450")
        c.paint(foam, "#ffd9c0", 0.6)
    across = (x - 700) / (18 + 13 * (y - 205) / 210)  # the tower: -1 on its lit side, 1 in shade
    body, curved = (np.abs(across) < 1) & (y > 205) & (y < 414), y - 205 - 4 * (1 - across**2)
    c.paint(body, "-1 #ffd9b0 -0.5 #fff3e2 0.3 #c9b0c4 1 #65588c", along=across)
    c.paint(body & (curved // 42 % 2 == 1), "-1 #f7936f -0.5 #e2574f 0.3 #a53a55 1 #5a2a56", along=across)
    rails = ",".join(f"r {u} 185 {u + 1} 197, r {u / 2 + 350} 162 {u / 2 + 351} 196" for u in range(670, 731, 10))
    c.draw(f"""p 664 412 736 412 742 432 658 432 | x 658 #e0b6a6 742 #5c4d7c; o 700 161 21 20, r 698.5 128 701.5 145 | x
        680 #e8705e 722 #5a2a56; r 683 162 717 196 | y 160 #ffefb0 178 #fffbe6 196 #ffd98a; {rails}, r 677 159 723 163,
        o 692 270 4 7, o 696 354 4.5 8, r 691 391 705 412, o 698 391 7 7, r 672 196 728 206, r 670 184 730 186 | #3b2d58;
        r 806 384 878 418 | x 806 #f0cdb4 878 #7c6592; r 852 346 861 362, p 797 386 818 358 866 358 887 386 | x 797
        #c0605c 887 #4d2c5c; r 817 394 828 406, r 856 394 867 406 | #ffe08a; r 836 394 848 418, p 150 436 206 436 196 447
        160 447, p 455 232 444 226 434 231 444 229 455 234 466 229 476 231 466 226 | #3a2e5b; p 176 378 176 432 150 432,
        p 180 386 180 432 203 432 | x 176 #ffe6cc 181 #f3a58f; g 700 178 75 | #fff2c0 | .6""")
    beam = clip(1 - np.abs(y - 178 + (x - 700) / 10) / (7 + np.abs(x - 700) / 12), 0, 1)
    c.paint(beam * clip(1 - np.abs(x - 700) / 640, 0, 1) ** 1.5, "#fff0b8", 0.85)


def tower(c: Canvas) -> None:
    x, y, sin = c.x, c.y, np.sin
    stars = ",".join(f"o {i * i * 97 % 641} {i**3 * 57 % 631} {1 - i % 5 / 9} {1 - i % 5 / 9}" for i in range(1, 140))
    c.draw(f"""r 0 0 640 960 | y 0 #0c1233 280 #1d2d63 520 #4a4f92 680 #8f76ad 790 #e0a9b4; {stars} | #fff4dc | .8;
        g 455 205 340 | #8fa0e0 | .5; g 455 205 150 | #fff0d0 | .6; o 455 205 74 74 | y 131 #fffbea 279 #edd9ba;
        o 430 180 17 17, o 480 168 9 9, o 470 222 21 21, o 425 232 10 10, o 500 205 8 8, o 446 148 6 6 | #e4cdac | .8""")
    c.clouds("#c9b6dd", "#56609f", (530, 268, 210), (70, 330, 200), (150, 120, 140), (600, 455, 200), (20, 520, 180))
    for i, tones in enumerate(("0 #7d74b4 110 #c9a3bd", "0 #575b9d 110 #a58cb6", "0 #353f7c 110 #6f6ba6")):
        depth = y - 668 - 47 * i + (46 - 12 * i) * (sin(x / (88 - 16 * i) + 2.2 * i) + 0.5 * sin(x / (37 - 6 * i) + i))
        c.paint(depth > 0, tones, along=depth)
    for u, v in ((18, 812), (72, 804), (118, 796), (448, 804), (502, 804), (580, 812)):  # houses
        c.draw(f"""r {u} {v - 34} {u + 46} 880 | x {u} #2a3168 {u + 46} #4f4f8b; p {u - 5} {v - 32} {u + 23} {v - 60} {u + 51}
            {v - 32} | x {u + 23} #1e2557 {u + 24} #5a5088; r {u + 9} {v - 22} {u + 17} {v - 11} | #ffd885""")
    depth = y - 842 + 92 * np.exp(-(((x - 275) / 210) ** 2)) - 10 * sin(x / 90)  # the hill, and a path down it
    path = np.abs(x - 290 - (y - 752) * 0.35 * sin((y - 752) / 48)) < 13 + (y - 752) * 0.19
    c.paint(depth > 0, "0 #b9c6dd 2 #4a6a86 14 #2f4c74 70 #20345f 200 #111b42", along=depth)
    c.paint(path & (depth > 0), "y 752 #e8cdb0 850 #9a8fae 960 #4d4f80")
    for w, y0, y1 in ((58, 736, 762), (46, 470, 738), (52, 462, 474), (50, 340, 464), (60, 326, 342), (38, 262, 328)):
        c.paint(c.mask(f"r {290 - w} {y0} {290 + w} {y1}"), "-1 #262a5c 0.6 #a08db0 1 #e4cfc4", along=(x - 290) / w)
    c.paint(c.mask("r 244 350 336 736") & ((y % 15 < 1.1) | ((x + y // 15 * 17) % 34 < 1.1)), "#23265a", 0.28)
    c.paint(c.mask("p 238 264 290 118 342 264"), "-0.4 #1d2356 0.1 #6d63a0 0.4 #b79bbb", along=(x - 290) / (y - 110))
    hours = ",".join(f"o {290 + 33 * sin(i * np.pi / 6)} {406 + 33 * np.cos(i * np.pi / 6)} 2 2" for i in range(12))
    c.draw(f"""r 244 474 336 492, r 240 342 340 350, r 252 262 328 268 | #171b48 | .35; r 289 90 291 122, r 283 100 297 102,
        o 290 120 4 4 | #f2d9a0; r 256 286 272 326, o 264 286 8 9, r 282 286 298 326, o 290 286 8 9, r 308 286 324 326,
        o 316 286 8 9 | y 276 #ff9d5c 326 #ffe7a0; r 283 520 297 550, o 290 520 7 8, r 283 590 297 620, o 290 590 7 8,
        r 283 660 297 690, o 290 660 7 8 | y 510 #ffd58c 690 #ffb468; p 279 301 281 294 285 290 290 289 295 290 299 294
        301 301 305 306 275 306 | #3a2c50; g 290 406 95 | #ffdc90 | .55; o 290 406 44 44 | #2a2858; o 290 406 39 39 | y
        367 #fffbe2 445 #ffd884; {hours}, p 288 408 309 388 292 410, p 288 407 283 376 292 405, o 290 406 4 4 | #3a2c50;
        r 274 716 306 762, o 290 716 16 17 | #2a1f45; r 278 718 302 762, o 290 718 12 13 | y 705 #7a4a55 762 #c98a5e""")
    for u, v, h in ((176, 790, 120), (206, 776, 84), (388, 786, 104), (420, 800, 138), (60, 868, 150), (585, 872, 170)):
        half = np.clip((y - v + h) / h, 0, 1) ** 0.7 * np.clip((v + 8 - y) / (h * 0.25), 0, 1) ** 0.5
        c.paint(np.abs(x - u) < 0.13 * h * half, "-0.13 #0f1a40 0.03 #1f3a60 0.13 #5f86a0", along=(x - u) / h)
    for u, v in ((238, 742), (372, 800), (214, 860)):
        c.draw(f"r {u - 1.5} {v} {u + 1.5} {v + 58} | #12163a; g {u} {v} 60 | #ffcf7a | .75; o {u} {v} 6 7 | #fff3c4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file differs from its drawing")
    check, worst = parser.parse_args().check, 0
    for scene, width, height in ((lighthouse, 960, 640), (tower, 640, 960)):
        path, canvas = HERE / f"{scene.__name__}.png", Canvas(width, height)
        scene(canvas)
        drawn = np.rint(canvas.pixels.reshape(height, SCALE, width, SCALE, 3).mean(axis=(1, 3))).astype(np.uint8)
        if not check:
            Image.fromarray(drawn).save(path, optimize=True)
        apart = int(np.abs(np.asarray(Image.open(path).convert("RGB"), dtype=int) - drawn).max())
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, at most {apart} of 255 levels from its drawing")
        worst = max(worst, apart)
    return int(worst > 1)


if __name__ == "__main__":
    raise SystemExit(main())
