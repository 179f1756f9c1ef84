HOSTILE = """ "'><script>alert(1)</script><img src=x onerror=alert(1)></p></style></article><a href="javascript:0">"""


def tags_and_text(page):
    """The kinds of tags that a browser sees, with the names of their attributes, and the text between them."""
    parser, tags, text = HTMLParser(), set(), []
    parser.handle_starttag = lambda tag, attributes: tags.add((tag, *(name for name, _ in attributes)))
    parser.handle_data = text.append
    parser.feed(page.read_text())
    return tags, "".join(text)


def spoiled(value):
    if isinstance(value, dict):
        return {name: item if name == "images" else spoiled(item) for name, item in value.items()}
    return [*map(spoiled, value)] if type(value) is list else value + HOSTILE if type(value) is str else value


def test_the_report_shows_all_stages_and_no_text_of_models_and_data_becomes_a_tag(toy_run, tmp_path):
    run_dir = shutil.copytree(toy_run, tmp_path / "run", symlinks=True)
    tags, text = tags_and_text(run_dir / "report.html")
    assert ("img", "alt", "src") in tags and "Evaluation" in text and "Difficulty" in text
    assert all(f"{stage}, step 2" in text for stage in ("warmup", "perception", "reasoning"))
    for path in [
        run_dir / "sample/hard.json",
        *run_dir.rglob("samples.jsonl"),
        *run_dir.rglob("pred*.jsonl"),
    ]:
        lines = [read_json(path)] if path.suffix == ".json" else read_lines(path)
        path.write_text("".join(json.dumps(spoiled(line)) + "\n" for line in lines))
    for name, folders in (("train", ("perception", "reasoning")), ("test", ("evaluate", "evaluate/test"))):
        path = run_dir / f"{name}.json"
        path.write_text(json.dumps(spoiled(read_json(toy_run / "toy" / path.name))))
        moved = {"from_data": str(path), "data": str(path), "image_root": f"{toy_run}/toy"}
        for settings in (run_dir / folder / "settings.json" for folder in folders):
            settings.write_text(json.dumps(read_json(settings) | moved))
    pebr.write_report(run_dir)
    hostile_tags, hostile_text = tags_and_text(run_dir / "report.html")
    assert hostile_tags == tags and hostile_text.count(HOSTILE.strip()) > 100


def test_the_report_marks_keywords_and_sections_and_reads_the_end_of_a_long_torn_file(toy_run, tmp_path):
    page = pebr.gallery(Row("", "1", "<image>q", "2", [], ["red dot", "cat"]), ["head"], [GOOD])
    assert '<span class="k1">red dot</span>, <span class="k0">cat</span>' in page
    assert '<p class="description"><small>Image Description</small> Two red dots. </p>' in page
    run_dir = shutil.copytree(toy_run, tmp_path / "run", symlinks=True)
    samples, report = run_dir / "perception" / "samples.jsonl", (run_dir / "report.html").read_bytes()
    samples.write_text(json.dumps("x" * 2**20) + "\n" + samples.read_text() + '{"torn": ')
    pebr.write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == report
