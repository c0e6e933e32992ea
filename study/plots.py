"""The plots of the study, each a PNG."""

from study.arms import CONFIRMATORY, SINGLE, TITLES
from study.statistics import t_interval
from support.files import write_file
from support.report import new_figure


def save(figure, path):
    # Without the version of matplotlib, so that another one may draw the same bytes.
    options = {'format': 'png', 'dpi': 120, 'metadata': {'Software': None}}
    write_file(path, lambda file: figure.savefig(file, **options))


def draw_effects(differences, path):
    """Differences of `tables.compare_arms` with their t intervals, a line for each and a panel for each metric."""
    groups = [[key for key in differences if key[2] == name] for name in SINGLE]
    groups = [keys for keys in groups if keys]
    heights = [len(keys) + 1 for keys in groups]
    figure = new_figure(figsize=(8, 1 + 0.26 * sum(heights) + 0.5 * len(groups)), layout='constrained')
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=heights)[:, 0]
    for axes, keys in zip(panels, groups):
        for row, key in enumerate(reversed(keys)):
            found, colour = differences[key], 'C0' if key in CONFIRMATORY else 'grey'
            axes.plot(found.t_interval, [row, row], color=colour, linewidth=2)
            axes.plot(found.mean, row, 'o', color=colour)
            axes.plot(found.fold_means, [row] * len(found.fold_means), '|', color='black')
        axes.set_yticks(range(len(keys)), [f'{arm} - {reference}' for arm, reference, _ in reversed(keys)])
        axes.axvline(0, color='grey', linestyle='--', linewidth=1)
        axes.set(ylim=(-0.7, len(keys) - 0.3), xlabel=f'difference of test {TITLES[keys[0][2]]}')
    figure.supxlabel('lines: 95 %, t of the folds; dashes: folds; blue: confirmatory, grey: exploratory', fontsize=9)
    save(figure, path)


def draw_masks(masks, dice, path):
    """Test Dice against the number of masks in training, on the folds that all these arms have.

    Both are tables of folds x arms, NaN where there is no run.
    """
    lines = [[f'{name}-50', f'{name}-200', f'{name}-800', name] for name in ('unet', 'mtl')]
    dice = dice[sum(lines, [])].dropna(axis=1, how='all').dropna()
    counts = masks.loc[dice.index, dice.columns].mean()
    figure = new_figure(figsize=(6, 4), layout='constrained')
    axes = figure.subplots()
    for line, colour, text in zip(lines, ('C1', 'C0'), ('mask only', 'all tasks')):
        arms = [arm for arm in line if arm in dice]
        axes.plot(counts[arms], dice[arms].mean(), '.-', color=colour, label=text)
        for fold in dice.index:
            axes.plot(counts[arms], dice.loc[fold, arms], '_', color=colour)
    axes.set(xlabel='masks in training', ylabel='test Dice, mean over folds; dashes: folds', xscale='log')
    axes.minorticks_off()
    ticks = sorted({f'{count:.0f}' for count in counts}, key=float)
    axes.set_xticks([float(tick) for tick in ticks], ticks)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def draw_gains(gains, path):
    """The gains of each arm with the intervals of the folds, a panel for each task."""
    figure = new_figure(figsize=(9, 1 + 0.3 * len(gains)), layout='constrained')
    for axes, name in zip(figure.subplots(1, len(SINGLE), sharey=True), SINGLE):
        for row, gain in enumerate(reversed(gains.values())):
            if name in gain:
                axes.plot([100 * bound for bound in t_interval(gain[name])], [row, row], color='C0')
                axes.plot(100 * gain[name].mean(), row, 'o', color='C0')
        axes.set_yticks(range(len(gains)), [f'{arm}, {len(gain)} folds' for arm, gain in reversed(gains.items())])
        axes.axvline(0, color='grey', linestyle='--', linewidth=1)
        axes.set_title(TITLES[name])
    figure.supxlabel(
        'gain over the network of only that task, per cent of its score; lines: 95 %, t of the folds', fontsize=9
    )
    save(figure, path)
