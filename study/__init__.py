"""The study: do other tasks help the mask, how should the tasks be weighted, does it pay with few masks?

    pip install -r study/requirements.txt
    python data_prepare.py --root DIR --size 128 --folds 5 --out datasets/folds
    python data_rechunk.py --data datasets/folds
    python -m study --data datasets/folds --jobs 2    # trains what is missing, goes on after any stop
    python -m study --table                           # only draws the tables and plots, from --out

Each arm, a way to train, is trained on each fold. Finished runs are kept in --out: runs.csv has a row for each of them,
scores.csv.gz the test metrics of each image, command.txt the command. table.md, effects.png, masks.png and gains.png
are drawn from the first two. What --out has is not trained again; logs and unfinished runs are in --runs. One --out is
of one data, device and commit.

arms.py says what is trained, runner.py trains it, results.py keeps the results and chooses the learning rates,
statistics.py compares, tables.py and plots.py show.
"""
