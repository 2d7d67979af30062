"""Bytes and metadata of tables: every system call of the library's Python code is made in this room.

`format`, `sealed` and `lineage` turn bytes into checked values and back. `directory` and `building` read, write and
replace whole files. `arrays`, `huge_pages`, `space`, `saving` and `writers` (with `locks`, `seats` and `recovery`) are
the parts of an open table, which `table_files` puts together and `binding` hands to the core. `blocks` reads and writes
array files by blocks.
"""

from hashemb._files import blocks, building, directory, format
from hashemb._files.arrays import Array
from hashemb._files.binding import bind_core
from hashemb._files.blocks import Bytes, Numbers
from hashemb._files.building import (
    building_directory,
    check_free,
    create_arrays,
    create_table,
    finish_table,
    new_directory,
    sync_directory,
)
from hashemb._files.directory import (
    HISTORY_FILE,
    Directory,
    boot_id,
    data_extents,
    open_regular,
    read_history,
    read_meta,
    read_snapshot_info,
    space_errors,
    table_directory,
    write_history,
)
from hashemb._files.format import (
    CONTROL_BYTES,
    CONTROL_DTYPE,
    DATA_OFFSET_BYTES,
    SMALL_FILE_BYTES,
    STORAGE_DTYPES,
    FileSpec,
    TableMeta,
    check_npy_header,
    expect_rate,
    id_bytes,
    meta_content,
    meta_of_content,
    page_id,
    rows_per_block,
    seal_control,
)
from hashemb._files.lineage import MAX_POINTS, MOMENT_RULES, History, Point, SnapshotInfo, check_extra, new_id
from hashemb._files.locks import Lock
from hashemb._files.saving import BITS_FILE, LOG_PREFIX, SAVING_FILE, bits_bytes
from hashemb._files.sealed import dump_line, load_checked
from hashemb._files.seats import SEATS_FILE, abandoned_rows
from hashemb._files.table_files import TableFiles

__all__ = [
    "BITS_FILE",
    "CONTROL_BYTES",
    "CONTROL_DTYPE",
    "DATA_OFFSET_BYTES",
    "HISTORY_FILE",
    "LOG_PREFIX",
    "MAX_POINTS",
    "MOMENT_RULES",
    "SAVING_FILE",
    "SEATS_FILE",
    "SMALL_FILE_BYTES",
    "STORAGE_DTYPES",
    "Array",
    "Bytes",
    "Directory",
    "FileSpec",
    "History",
    "Lock",
    "Numbers",
    "Point",
    "SnapshotInfo",
    "TableFiles",
    "TableMeta",
    "abandoned_rows",
    "bind_core",
    "bits_bytes",
    "blocks",
    "boot_id",
    "building",
    "building_directory",
    "check_extra",
    "check_free",
    "check_npy_header",
    "create_arrays",
    "create_table",
    "data_extents",
    "directory",
    "dump_line",
    "expect_rate",
    "finish_table",
    "format",
    "id_bytes",
    "load_checked",
    "meta_content",
    "meta_of_content",
    "new_directory",
    "new_id",
    "open_regular",
    "page_id",
    "read_history",
    "read_meta",
    "read_snapshot_info",
    "rows_per_block",
    "seal_control",
    "space_errors",
    "sync_directory",
    "table_directory",
    "write_history",
]
