import logging


def test_a_log_gets_a_line_with_rate_and_time_left_now_and_then(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "dreslcl")
    with progress.progress("embedding", 100, "tiles") as bar:
        for _ in range(10):
            clock[0] += 8
            bar.advance(bar.task_ids[0], 10)
    lines = [record.message for record in caplog.records]
    assert [line.split(" tiles")[0].split() for line in lines] == [["embedding", "40/100"], ["embedding", "80/100"]]
    assert all("/s " in line and line.endswith(" left") for line in lines)


def test_quiet_shows_none(monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY_S", 0)
    monkeypatch.setattr(logging.getLogger("dreslcl"), "level", logging.WARNING)
    with progress.progress("embedding", 1, "tiles") as bar:
        bar.advance(bar.task_ids[0])
    assert bar.disable and not caplog.records
