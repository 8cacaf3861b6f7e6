"""Run directories in; curves, tables and pictures out.

    runs = find_runs("runs")
    show(runs_table(runs))                      # a table, in a notebook
    figure = plot_history(runs)                 # a figure, in a notebook
    figure.savefig("curves.png")                # or in a file

Tables are markdown, and say the same however often they are made; figures are matplotlib's, and
say in their title on which data they rest. Nothing here trains, and nothing here writes.
"""

from analysis.figures import (
    plot_accuracy_vs_cost,
    plot_augmentations,
    plot_class_counts,
    plot_confusion,
    plot_costs,
    plot_effective_receptive_field,
    plot_history,
    plot_mistakes,
    plot_per_class,
    plot_receptive_field,
    plot_reliability,
    plot_samples,
    plot_study,
)
from analysis.measures import (
    CalibrationBin,
    calibration,
    confusion_matrix,
    effective_receptive_field,
)
from analysis.runs import (
    Answers,
    Network,
    Run,
    answers,
    find_runs,
    load_data,
    load_model,
    load_run,
    load_runs,
    published_code_run,
    published_networks,
    published_run,
    published_study,
)
from analysis.tables import (
    batch_check,
    choice_table,
    confusion_table,
    dilation_table,
    drops_table,
    field_table,
    fit_table,
    layer_table,
    metrics_table,
    recipes_table,
    runs_table,
    separable_table,
    show,
    show_source,
    start_table,
    study_table,
)

__all__ = [
    "Run",
    "load_run",
    "load_runs",
    "find_runs",
    "load_data",
    "load_model",
    "Answers",
    "answers",
    "show",
    "show_source",
    "recipes_table",
    "metrics_table",
    "runs_table",
    "study_table",
    "choice_table",
    "drops_table",
    "start_table",
    "fit_table",
    "confusion_table",
    "layer_table",
    "field_table",
    "separable_table",
    "dilation_table",
    "batch_check",
    "plot_class_counts",
    "plot_samples",
    "plot_augmentations",
    "plot_receptive_field",
    "plot_costs",
    "plot_history",
    "confusion_matrix",
    "plot_confusion",
    "plot_per_class",
    "plot_mistakes",
    "CalibrationBin",
    "calibration",
    "plot_reliability",
    "effective_receptive_field",
    "plot_effective_receptive_field",
    "plot_study",
    "Network",
    "published_networks",
    "published_code_run",
    "published_run",
    "published_study",
    "plot_accuracy_vs_cost",
]
