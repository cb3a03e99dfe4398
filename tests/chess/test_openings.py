"""Opening lines and positions from files: hand-written ones, and errors that name the line."""

from pathlib import Path

import pytest

from rookworld_trl.chess.play import read_lines, read_openings


def test_openings_are_read_as_moves_and_errors_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "openings.tsv"
    file.write_text("eco\tname\tpgn\nA00\tAmar\t1. Nh3 d5 2. g3\nC50\tItalian\t1. e4 e5 2. Nf3 Nc6 3. Bc4\n")
    assert read_lines(file) == [("g1h3", "d7d5", "g2g3"), ("e2e4", "e7e5", "g1f3", "b8c6", "f1c4")]
    file.write_text("eco\tname\tpgn\nA00\tBroken\t1. Nh3 d5 2. Ke5\n")
    with pytest.raises(ValueError, match="line 2, field 'pgn'"):
        read_lines(file)
    file.write_text("a,b\n")
    with pytest.raises(ValueError, match="no column 'pgn'"):
        read_lines(file)


def test_openings_from_files(tmp_path: Path) -> None:
    table = tmp_path / "openings.tsv"
    table.write_text("eco\tname\tpgn\nA\ta\t1. e4\nB\tb\t1. d4 d5\nC\tc\t1. e4\n")
    fens = {"rnbqkbnr/pppppppp/8/8/4P3/8/PPPP1PPP/RNBQKBNR b KQkq - 0 1"}
    fens.add("rnbqkbnr/ppp1pppp/8/3p4/3P4/8/PPP1PPPP/RNBQKBNR w KQkq - 0 2")
    assert set(read_openings(table, 2)) == fens
    lines = tmp_path / "lines.epd"
    lines.write_text("".join(f"{' '.join(fen.split()[:4])} bm e5;\n{fen}\n" for fen in sorted(fens)))
    assert len(read_openings(lines, 3)) == 3  # one of them has other clocks without its FEN's
    with pytest.raises(ValueError, match=r"openings\.tsv: holds 2 different openings, 3 are"):
        read_openings(table, 3)
    lines.write_text("8/8/8/8 w - -\n")
    with pytest.raises(ValueError, match=r"lines\.epd, line 1"):
        read_openings(lines, 1)
