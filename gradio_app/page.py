"""The Gradio page: one screen in `static/screen.html`, dressed in Gradio's theme (so that it follows light and dark), and moved by `static/app.js`."""
from pathlib import Path

STATIC = Path(__file__).with_name('static')
HEAD = '<link rel="stylesheet" href="/api/file/app.css"><meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'

def theme():
    "Gradio's own theme with fonts of the visitor's machine: nothing is fetched from elsewhere."
    import gradio as gr
    plain = ['ui-sans-serif', 'system-ui', 'sans-serif']
    return gr.themes.Default(font=plain, font_mono=['ui-monospace', 'monospace'])

def make_page():
    "The whole interface."
    import gradio as gr
    screen = (STATIC/'screen.html').read_text(encoding='utf-8')
    with gr.Blocks(title='MIDAS live', analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as demo:
        gr.HTML(html_template=screen, js_on_load="import('/api/file/app.js').then(m => m.begin(element))", elem_id='midas', apply_default_css=False)
    return demo
