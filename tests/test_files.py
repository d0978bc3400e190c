import os

import pytest

from jaxsae.files import InputError, atomic_directory, atomic_file


def write(manager, path, text):
    """Write `text` as a file, or as a directory that holds it, through one of the two managers."""
    with manager(path) as temporary:
        (temporary if manager is atomic_file else temporary / "a.txt").write_text(text)


def read(manager, path):
    return (path if manager is atomic_file else path / "a.txt").read_text()


@pytest.fixture(params=[atomic_file, atomic_directory])
def manager(request):
    return request.param


def test_it_appears_whole_and_nothing_else_does(manager, tmp_path):
    write(manager, tmp_path / "out", "new")
    assert read(manager, tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_missing_parents_are_made(manager, tmp_path):
    write(manager, tmp_path / "a" / "b" / "out", "new")
    assert read(manager, tmp_path / "a" / "b" / "out") == "new"


def test_what_was_there_is_replaced(manager, tmp_path):
    write(manager, tmp_path / "out", "old")
    write(manager, tmp_path / "out", "new")
    assert read(manager, tmp_path / "out") == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_what_was_there_stays_until_the_block_ends(manager, tmp_path):
    write(manager, tmp_path / "out", "old")
    with manager(tmp_path / "out") as temporary:
        (temporary if manager is atomic_file else temporary / "a.txt").write_text("new")
        assert read(manager, tmp_path / "out") == "old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_exception_leaves_what_was_there_and_no_other_file(manager, error, before, tmp_path):
    if before:
        write(manager, tmp_path / "out", before)
    with pytest.raises(error), manager(tmp_path / "out") as temporary:
        (temporary if manager is atomic_file else temporary / "a.txt").write_text("half")
        raise error
    assert os.listdir(tmp_path) == (["out"] if before else [])
    if before:
        assert read(manager, tmp_path / "out") == before


def test_a_rename_that_fails_leaves_what_was_there(manager, tmp_path, monkeypatch):
    write(manager, tmp_path / "out", "old")

    def fail(source, target, rename=os.rename):
        if str(target) == str(tmp_path / "out") and os.path.basename(source) in ("new", "out"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    with pytest.raises(OSError, match="No space"), monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        patch.setattr(os, "replace", fail)
        write(manager, tmp_path / "out", "new")
    assert read(manager, tmp_path / "out") == "old"


@pytest.mark.parametrize("parent", ["file", "file/deeper"])
def test_a_place_that_cannot_be_written(manager, parent, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    out = tmp_path / parent / "out"
    with pytest.raises(InputError, match=r"cannot write .*; choose another place") as caught:
        write(manager, out, "new")
    assert str(out) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_without_permission(manager, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match=r"cannot write .*Permission denied"):
        write(manager, tmp_path / "locked" / "out", "new")


def test_what_is_written_has_the_permissions_of_any_other(manager, tmp_path):
    # Temporary places are private; what comes out of them must not be.
    write(manager, tmp_path / "out", "new")
    (tmp_path / "plain").mkdir() if manager is atomic_directory else (tmp_path / "plain").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
