"""Run directories in; tables and figures out.

    runs = find_runs("runs")
    table = runs_table(runs)                    # a DataFrame, to sort, filter, plot and save
    styled(table)                               # as it looks best in a notebook
    print(markdown(table))                      # ... and in a page
    figure = plot_history(runs)                 # matplotlib's; shown in a notebook
    figure.savefig("curves.png")                # or put into a file

Figures say in their title on which data they rest. Nothing here trains, and nothing here writes.
"""

from tinycifar.analysis.figures import *  # noqa: F403
from tinycifar.analysis.measures import *  # noqa: F403
from tinycifar.analysis.presentation import *  # noqa: F403
from tinycifar.analysis.runs import *  # noqa: F403
from tinycifar.analysis.tables import *  # noqa: F403
