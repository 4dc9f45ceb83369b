"""What a real browser makes of a page: headless Chromium, where it is installed."""

import html
import json
import re
import shutil
import subprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Run in the page after it was drawn; what it finds goes into the document, which Chromium prints.
SCRIPT = """<script>addEventListener("load",()=>{
const light=c=>{const [r,g,b]=c.map(v=>(v/=255)<=.03928?v/12.92:((v+.055)/1.055)**2.4);return .2126*r+.7152*g+.0722*b};
const rgb=s=>s.match(/[\\d.]+/g).map(Number);
const behind=e=>{for(;e;e=e.parentElement){const c=rgb(getComputedStyle(e).backgroundColor);if(c.length<4||c[3]>0)
return c.slice(0,3)}return [255,255,255]};
let least=99,where="";const walk=document.createTreeWalker(document.body,NodeFilter.SHOW_TEXT);
while(walk.nextNode()){const e=walk.currentNode.parentElement;if(!walk.currentNode.data.trim()||
["SCRIPT","STYLE","title"].includes(e.tagName))continue;const s=getComputedStyle(e);
let back=behind(e);const cell=e.tagName=="text"&&e.previousElementSibling;
if(cell&&cell.tagName=="rect"){const f=rgb(getComputedStyle(cell).fill),o=+getComputedStyle(cell).fillOpacity;
back=back.map((b,i)=>b*(1-o)+f[i]*o)}
const a=light(rgb(e.tagName=="text"?s.fill:s.color).slice(0,3)),b=light(back),
c=(Math.max(a,b)+.05)/(Math.min(a,b)+.05);if(c<least){least=c;where=walk.currentNode.data}}
const out=document.createElement("pre");out.id="found";out.textContent=JSON.stringify({width:innerWidth,
overflow:document.documentElement.scrollWidth-document.documentElement.clientWidth,images:document.images.length,
missing:[...document.images].filter(i=>!i.naturalWidth).length,contrast:least,where,
unequal:[...document.querySelectorAll(".row")].filter(r=>new Set([...r.children].map(e=>e.offsetWidth)).size>1)
.length});parent.document.body.append(out)})</script>"""


def look(page, folder, width, media=""):
    """Open the HTML file `page` in a frame of this width (a window of Chromium's has at least 500 pixels).

    With `media`, such as "print", the rules for that medium hold.

    Returns `width`, `overflow` (pixels beyond the window), `images`, `missing` (images that do not show), `contrast`
    (the least between text and what is behind it), `unequal` (rows whose parts differ in width) and `console` (errors).
    """
    copy = folder / f"{page.stem}-{width}.html"
    text = page.read_text(encoding="utf-8")
    if media:
        assert f"@media {media}{{" in text
        text = text.replace(f"@media {media}{{", "@media all{")
    inside = html.escape(text.replace("</body>", SCRIPT + "</body>"))
    frame = f'<!doctype html><link rel="icon" href="data:,"><iframe style="width:{width}px;height:900px;border:0" '
    copy.write_text(f'{frame}srcdoc="{inside}"></iframe>', encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--window-size=1400,1000"]
    result = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found, result.stderr[-2000:]
    errors = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), "console": errors}
