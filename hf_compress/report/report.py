"""A report: results that print, save and draw themselves."""

import logging
from dataclasses import dataclass
from pathlib import Path

from hf_compress.files.output import Output
from hf_compress.report.page import html_page
from hf_compress.report.plot import trade_off_png
from hf_compress.report.result import Results
from hf_compress.report.tables import csv_text, markdown, terminal_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report(Results):
    """Several models, compared on the same examples and in turns on the same machine."""

    def table(self) -> str:
        """For a terminal, about 120 columns."""
        return terminal_table(self)

    def to_markdown(self) -> str:
        return markdown(self)

    def to_csv(self) -> str:
        """One line a model, plain numbers in SI units."""
        return csv_text(self)

    def to_html(self) -> str:
        """One page that needs no other file and no network."""
        return html_page(self, self._plot())

    def _plot(self) -> bytes | None:
        if not self.num_examples:
            return None
        try:
            return trade_off_png(self)
        except ImportError as error:
            logger.warning("The report has no plot: %s", error)
            return None

    def files(self) -> dict[str, bytes]:
        """report.json, .md, .csv, .html and, where quality was measured and matplotlib is there, report.png."""
        plot = self._plot()
        texts = {"json": self.to_json(), "md": self.to_markdown(), "csv": self.to_csv(), "html": html_page(self, plot)}
        files = {f"report.{ending}": text.encode() for ending, text in texts.items()}
        return files if plot is None else {**files, "report.png": plot}

    def save(self, folder: str | Path) -> Path:
        """Write `files` into `folder`, made before anything is written, each replaced whole or not at all.

        Raises ValueError for a file of these names that is not of an earlier report, or was changed since.
        """
        content = self.files()
        with Output(folder, shared=True) as output:
            output.write(content)
        return Path(folder)
