"""Re-execute pages in place and make README.md: python tools/pages.py run [--slow] [NOTEBOOK ...] | readme [--check]

`run` executes each page in its own folder with a real Jupyter kernel, as a reader would, and saves plain PNG outputs.
Cells that carry the directive `slow` or `gpu` are left alone, with the outputs that they recorded, unless --slow asks
for the slow ones. `readme` turns nbs/index.ipynb into README.md without Quarto.
"""
import argparse, json, os, re, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'

def notebooks():
    "Every page, in reading order of its number."
    found = [p for p in NBS.rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts)]
    return sorted(found, key=lambda p: (p.stem == 'index', p.stem))

def directives(cell):
    "The nbdev directives of a cell, such as {'export', 'slow'}."
    return {m.group(1).rstrip(':') for m in re.finditer(r'^#\|\s*(\S+)', cell.source, re.M)}

def lighter(png:str)->str:
    "A large figure in base64, in 256 colours; pictures without an alpha channel are no figures of matplotlib but pixels to be compared, and stay."
    import base64, io
    from PIL import Image
    if len(png) < 130_000 or (im := Image.open(io.BytesIO(base64.b64decode(png)))).mode != 'RGBA': return png
    out = io.BytesIO(); im.convert('RGB').quantize(256, kmeans=1).save(out, 'PNG', optimize=True)
    return base64.b64encode(out.getvalue()).decode()

def execute(path, slow):
    "Run one page and save it; returns the seconds it took."
    import nbformat
    from nbclient import NotebookClient
    skip = {'gpu'} | (set() if slow else {'slow'})

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
            d = directives(cell)
            if d & skip or ('eval' in d and re.search(r'^#\|\s*eval:\s*false', cell.source, re.M)): return cell
            return await super().async_execute_cell(cell, cell_index, *args, **kwargs)

    nb, start = nbformat.read(path, 4), time.time()
    Client(nb, timeout=3600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}, record_timing=False).execute()
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        cell.execution_count = None
        for out in cell.outputs:
            if 'execution_count' in out: out['execution_count'] = None
            if 'image/png' in out.get('data', {}): out['data']['image/png'] = lighter(out['data']['image/png'])
    nb.metadata.pop('widgets', None) if not any('widget' in str(o) for c in nb.cells if c.cell_type == 'code' for o in c.outputs) else None
    nb.metadata = {k: v for k, v in nb.metadata.items() if k in ('kernelspec', 'widgets')}
    nb.metadata['kernelspec'] = {'display_name': 'python3', 'language': 'python', 'name': 'python3'}
    path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')
    return time.time() - start

def readme_text():
    "README.md as made from nbs/index.ipynb, and the pictures it needs (path -> bytes)."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb = nbformat.read(NBS/'index.ipynb', 4)
    nb.cells = [c for c in nb.cells if 'hide' not in (directives(c) if c.cell_type == 'code' else ())]
    for c in nb.cells:
        if c.cell_type == 'code' and re.search(r'^#\|\s*echo:\s*false', c.source, re.M): c.metadata['tags'] = ['no-source']
    hide = Config({'TagRemovePreprocessor': {'enabled': True, 'remove_input_tags': {'no-source'}}})
    text, res = MarkdownExporter(config=hide).from_notebook_node(nb)
    alts = [m.group(1) for c in nb.cells for m in re.finditer(r'^#\|\s*fig-alt:\s*(.*)', c.source, re.M)]
    pictures = {}
    for i, (name, data) in enumerate(sorted(res.get('outputs', {}).items())):
        pictures[f'nbs/images/readme_{i}.png'] = data
        text = re.sub(rf'\s*!\[png\]\({re.escape(name)}\)\s*', f'\n\n![{alts[i] if i < len(alts) else "figure"}](nbs/images/readme_{i}.png)\n\n', text)
    text = re.sub(r'\]\((?!https?://|#|nbs/)([^)]+)\)', lambda m: f'](nbs/{m.group(1)})', text)
    text = text.replace('](nbs/../', '](').replace('src="images/', 'src="nbs/images/')
    head = '<!-- made from nbs/index.ipynb by `make readme`; edit the notebook -->\n\n'
    return head + re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', pictures

def readme(check):
    "Write README.md, or with `check` only say whether it is up to date."
    text, pictures = readme_text()
    files = {'README.md': text.encode()} | pictures
    stale = [f for f, data in files.items() if not (ROOT/f).is_file() or (ROOT/f).read_bytes() != data]
    if check: return stale
    for f in stale: (ROOT/f).parent.mkdir(parents=True, exist_ok=True); (ROOT/f).write_bytes(files[f])
    return []

def main():
    "The command line."
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = ap.add_subparsers(dest='what', required=True)
    run = sub.add_parser('run', help='re-execute pages in place'); run.add_argument('paths', nargs='*', type=Path); run.add_argument('--slow', action='store_true')
    rd = sub.add_parser('readme', help='make README.md from nbs/index.ipynb'); rd.add_argument('--check', action='store_true')
    a = ap.parse_args()
    if a.what == 'readme':
        stale = readme(a.check)
        if stale: sys.exit(f"Out of date: {', '.join(stale)}. Run `make readme`.")
        return
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    for p in a.paths or notebooks():
        if not p.is_file(): sys.exit(f"No notebook at {p}.")
        seconds = execute(p.resolve(), a.slow)
        print(f"{p}: {seconds:.1f} s, {p.stat().st_size/1e3:.0f} kB", flush=True)

if __name__ == '__main__': main()
