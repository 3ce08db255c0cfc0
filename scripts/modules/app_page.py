"""The page of app.py in Gradio: its fields, and what happens when a button is pressed.

What a person typed, and messages that may quote foreign text, are shown escaped or as plain text.
"""

import html
import json
import shlex
from pathlib import Path

import gradio as gr
from modules.studio import Studio, form_of_record, gallery

from flux.errors import UserError
from flux.image_io.output import read_metadata
from flux.image_io.request import MAX_IMAGES, REQUIRES_IMAGE, supported_options
from flux.weights.locate import get_spec

CSS = """
.gradio-container {width: 100%; max-width: 1240px !important; margin: 0 auto}
footer {display: none !important}
#title h1 {margin: 0; font-size: 1.35rem} #title p {margin: 0; opacity: .75}
.job {font-size: .9rem; line-height: 1.45; overflow-wrap: anywhere}
.job .track {height: .5rem; border-radius: .25rem; background: var(--neutral-200); overflow: hidden}
.job .bar {height: 100%; background: var(--primary-500); transition: width .2s}
.job p {margin: .35rem 0 0} .job .error {color: #b91c1c; font-weight: 600}
.dark .job .error {color: #fca5a5} .job details {opacity: .75; margin-top: .35rem}
#record textarea {font-family: ui-monospace, monospace; font-size: .8rem}
"""


class Page:
    """The fields, and what happens when a button is pressed. `demo` is Gradio's page."""

    def __init__(self, studio: Studio, lora_folder: Path | None):
        self.studio, self.lora_folder = studio, lora_folder
        self.spec = get_spec(studio.defaults.model, studio.defaults.transformer)
        self.jobs: dict[str, object] = {}  # of each open page
        self.fields: dict[str, object] = {}
        with gr.Blocks(
            title=f"flux: {self.spec.name}", analytics_enabled=False, fill_width=True
        ) as self.demo:
            note = "an embedded toy" if self.spec.embedded else self.spec.licence.name
            gr.Markdown(f"# {self.spec.name}\n{note}", elem_id="title")
            with gr.Row():
                with gr.Column(min_width=320):
                    self.request()
                with gr.Column(min_width=320):
                    self.result = gr.Image(
                        label="Image",
                        interactive=False,
                        format="jpeg",
                        elem_id="result",
                        buttons=["download", "fullscreen"],
                        height=420,
                    )
            with gr.Row():
                with gr.Column(min_width=320):
                    self.images()
                with gr.Column(min_width=320):
                    self.more()
            self.gallery_and_record()
            self.events()

    def request(self) -> None:
        fields, spec = self.fields, self.spec
        fields["prompt"] = gr.Textbox(
            label="Prompt",
            lines=3,
            max_lines=8,
            autofocus=True,
            elem_id="prompt",
            placeholder="What the image shows",
        )
        with gr.Row():
            self.generate = gr.Button(
                "Generate", variant="primary", elem_id="generate", min_width=120
            )
            self.cancel = gr.Button("Cancel", elem_id="cancel", min_width=120)
        self.status = gr.HTML(elem_id="status")
        with gr.Row():
            fields["width"] = short("Width", str(spec.size))
            fields["height"] = short("Height", str(spec.size))
            fields["steps"] = short("Steps", str(spec.steps))
        with gr.Row():
            fields["seed"] = short("Seed", "random")
            fields["num_images"] = short("Images", "1")

    def images(self) -> None:
        fields, mode = self.fields, self.spec.image_mode
        able = supported_options(self.spec)
        with gr.Accordion("Images", open=mode in REQUIRES_IMAGE, elem_id="input-images"):
            fields["editor"] = gr.ImageEditor(
                label="Image and mask" if "mask" in able else "Image",
                type="pil",
                format="png",
                layers=False,
                transforms=(),
                sources=("upload", "clipboard"),
                height=380,
                elem_id="editor",
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed") if "mask" in able else False,
                eraser=None if "mask" in able else False,
            )
            if MAX_IMAGES.get(mode, 1) > 1:
                fields["references"] = gr.File(
                    label="More images",
                    file_count="multiple",
                    file_types=["image"],
                    height=150,
                    elem_id="references",
                )
            if "mask" in able:
                fields["mask"] = gr.File(
                    label="Mask file (white may change)",
                    file_types=["image"],
                    height=150,
                    elem_id="mask",
                )
            with gr.Row():
                if "strength" in able:
                    fields["strength"] = short("Strength", "0 to 1")
                if "outpaint" in able:
                    fields["outpaint"] = short("Outpaint", "L,T,R,B")
                if "match_image_size" in able:
                    fields["match_image_size"] = short("Size of image", "1: the first")
            for name in ("keep_input_size", "preprocess_control"):
                if name in able:
                    fields[name] = gr.Checkbox(label=name.replace("_", " ").capitalize())

    def more(self) -> None:
        fields, spec = self.fields, self.spec
        with gr.Accordion("More settings", open=False, elem_id="more"):
            if spec.cfg or spec.flux1:
                fields["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=2)
            with gr.Row():
                if spec.guidance is not None:
                    fields["guidance"] = short("Guidance", f"{spec.guidance:g}")
                if spec.flux1:
                    fields["true_cfg_scale"] = short("True CFG scale", "off")
            if self.lora_folder:
                files = sorted(self.lora_folder.glob("*.safetensors"))
                with gr.Row():
                    choices = [("none", "")] + [(path.stem, str(path)) for path in files]
                    fields["lora"] = gr.Dropdown(choices, value="", label="LoRA", elem_id="lora")
                    fields["lora_scale"] = short("LoRA scale", "1")
            with gr.Row():
                for name in ("filter", "watermark"):
                    if getattr(self.studio.defaults, name) is None:
                        choices = [("none", ""), *self.studio.choices(name)]
                        fields[name] = gr.Dropdown(choices, value="", label=name.capitalize())
            if self.studio.flags:
                gr.Textbox(shlex.join(self.studio.flags), label="For all images", interactive=False)

    def gallery_and_record(self) -> None:
        self.paths, self.chosen = gr.State([]), gr.State(None)
        self.gallery = gr.Gallery(
            label="Gallery",
            columns=[2, 3, 4],
            fit_columns=False,
            height="auto",
            elem_id="gallery",
            object_fit="contain",
            interactive=False,
            allow_preview=True,
            buttons=["download"],
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self.record = gr.Textbox(
                    label="Record of the chosen image",
                    lines=4,
                    max_lines=14,
                    interactive=False,
                    buttons=["copy"],
                    elem_id="record",
                    placeholder="Choose an image of the gallery",
                )
            with gr.Column(min_width=320):
                self.upload = gr.File(
                    label="Or an image from elsewhere",
                    file_types=["image"],
                    height=150,
                    elem_id="upload",
                )
                with gr.Row():
                    self.load = gr.Button("Load settings", elem_id="load", min_width=120)
                    self.again = gr.Button("Make again", elem_id="again", min_width=120)

    # ---------------------------------------------------------------- what happens

    def events(self) -> None:
        hidden = dict(api_visibility="private", show_progress="hidden")
        shown = [self.status, self.result, self.gallery, self.paths]
        job = dict(outputs=shown, concurrency_id="model", concurrency_limit=1) | hidden
        runs = [
            gr.on(
                [self.generate.click, self.fields["prompt"].submit],
                self.make,
                inputs=set(self.fields.values()),
                **job,
            ),
            self.again.click(self.make_again, inputs=[self.chosen], **job),
        ]
        self.cancel.click(self.stop, outputs=shown, cancels=runs, queue=False, **hidden)
        self.gallery.select(self.choose, [self.paths], [self.chosen, self.record], **hidden)
        self.upload.upload(self.choose_upload, [self.upload], [self.chosen, self.record], **hidden)
        self.load.click(
            self.load_settings, [self.chosen], [self.status, *self.fields.values()], **hidden
        )
        self.demo.load(self.refresh, outputs=[self.gallery, self.paths], **hidden)
        self.demo.unload(self.leave)

    def make(self, values: dict, request: gr.Request):
        form = {name: values.get(field) for name, field in self.fields.items()}
        yield from self.follow(self.studio.make(form), request.session_hash)

    def make_again(self, chosen: str | None, request: gr.Request):
        if chosen is None:
            yield message("error: choose an image of the gallery first."), *[gr.skip()] * 3
            return
        yield from self.follow(self.studio.make_again(Path(chosen)), request.session_hash)

    def follow(self, job, session: str):
        """Yield what the page shows of a job, until its end."""
        self.jobs[session] = job
        known = None
        for update in job.updates():
            frame = str(update.frame) if isinstance(update.frame, Path) else update.frame
            images = [gr.skip()] * 2
            if update.finished != known:
                known, images = update.finished, self.refresh()
            yield status(update), frame, *images

    def stop(self, request: gr.Request):
        """Cancel the job of this page; wait until its step has ended."""
        job = self.jobs.pop(request.session_hash, None)
        if job is None:
            return message("Nothing is running."), *[gr.skip()] * 3
        job.cancel()
        job.thread.join()
        return status(job.update), gr.skip(), *self.refresh()

    def leave(self, request: gr.Request) -> None:
        """Cancel the job of a page that is closed."""
        if job := self.jobs.pop(request.session_hash, None):
            job.cancel()

    def refresh(self):
        paths = list(map(str, gallery(self.studio.folder)))
        return paths, paths

    def choose(self, paths: list[str], event: gr.SelectData):
        return self.shown_record(paths[event.index])

    def choose_upload(self, path: str):
        return self.shown_record(path)

    def shown_record(self, path: str):
        try:
            record = read_metadata(Path(path))
        except UserError as error:
            return None, str(error).replace(path, Path(path).name)
        return path, json.dumps(record, indent=2, ensure_ascii=False)

    def load_settings(self, chosen: str | None):
        same = [gr.skip()] * len(self.fields)
        if chosen is None:
            return message("error: choose an image with a record first."), *same
        try:
            form = form_of_record(Path(chosen), self.studio.folder)
        except UserError as error:
            return message(f"error: {error}"), *same
        images = list(map(str, form.pop("images")))
        form["editor"] = images[0] if images else None
        form["references"] = images[1:] or None
        form["mask"] = form["mask"] and str(form["mask"])
        kept = ("filter", "lora", "lora_scale")  # a record names no file of the folder
        values = [gr.skip() if name in kept else form.get(name) for name in self.fields]
        return message(f"Settings of {Path(chosen).name}."), *values


def short(label: str, placeholder: str) -> gr.Textbox:
    """Return a field of one line; empty: what `placeholder` says. sample.py checks the values."""
    name = label.lower().replace(" ", "-")
    return gr.Textbox(label=label, placeholder=placeholder, min_width=90, elem_id=name)


def status(update) -> str:
    """Return the HTML of a job: a bar, the last message, and all messages to unfold."""
    state = {None: "running", 0: "done"}.get(update.code, "ended")
    last = update.lines[-1] if update.lines else "starting"
    if update.code is None and update.share:
        last = f"{100 * update.share:.0f} %"
    if update.code == 0:
        last = f"done: {', '.join(path.name for path in update.finished)}"
    lines = "".join(f"<div>{html.escape(line)}</div>" for line in update.lines)
    return (
        f'<div class="job" role="status" data-state="{state}"><div class="track"><div class="bar" '
        f'style="width:{100 * update.share:.0f}%"></div></div>{paragraph(last)}'
        f"<details><summary>Messages</summary>{lines}</details></div>"
    )


def message(text: str) -> str:
    return f'<div class="job" role="status">{paragraph(text)}</div>'


def paragraph(text: str) -> str:
    kind = ' class="error"' if text.startswith("error: ") else ""
    return f"<p{kind}>{html.escape(text.removeprefix('error: '))}</p>"
