from graftllm.delta import Delta
from graftllm.evaluation.tables import Grid, layer_grid, pack_lines, printable, role_grid, table
from graftllm.packer import compress
from graftllm.packing_options import PackOptions
from tests.evaluation.test_anatomy import header_of


def test_layers_fit_on_a_screen() -> None:
    rows = layer_grid(header_of([f"h.{i}.w" for i in range(126)] + ["norm.weight"])).rows
    assert [row[0] for row in rows] == [*(f"{i}-{i + 7}" for i in range(0, 120, 8)), "120-125", "other"]
    assert rows[0][1:] == ["40", "6.3%", "4.00", "4.00, 50.0%"]
    assert rows[-1][1:] == ["5", "0.8%", "4.00", "4.00, 50.0%"]


def test_the_last_row_of_roles_is_all_of_them(delta: Delta) -> None:
    pack = compress(delta, PackOptions(strategy="paper"))
    *parts, whole = role_grid(pack.header).rows
    assert whole[:5] == ["all", "", "20", f"{delta.base.parameters:,}", f"{pack.payload_bytes:,}"]
    assert sum(int(row[4].replace(",", "")) for row in parts) == pack.payload_bytes


def test_a_pack_tells_its_options_and_operators(delta: Delta) -> None:
    lines = pack_lines(compress(delta, PackOptions(strategy="paper", energy=0.5)).header, 1000)
    assert "strategy     paper, energy 0.5, not calibrated" in lines
    assert "operators    matrices: 14 lowrank, 1 sparse; vectors: 5 exact" in lines


def test_a_strangers_text_cannot_steer_the_terminal() -> None:
    header = header_of(["w"])
    card = header.card.model_copy(update={"name": "\x1b[2J", "description": "a\nb"})
    assert pack_lines(header.model_copy(update={"card": card}), 5)[0] == "?[2J: a?b"
    assert printable("ä 漢 \x07") == "ä 漢 ?"


def test_cells_are_no_markup() -> None:
    drawn = table(Grid("title", ["name", "size"], [["[/red]", "12"]]))
    assert [str(cell) for cell in drawn.columns[0].cells] == ["[/red]"]
    assert [column.justify for column in drawn.columns] == ["left", "right"]
