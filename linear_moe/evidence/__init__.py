"""Language models on real text that differ in their token mixer alone: which remembers what it has read?

texts.py gathers the sources and documentation of the Python installation, jobs.py lists the models and their arguments
of `linear_moe.pretrain`, runs.py trains and measures them on the GPUs of the machine, recorded_run.py is the process
that trains one, measure.py and memories.py are the processes that read a trained one, trained_model.py loads its
checkpoint, repeats.py finds the tokens that could be recalled from the context, tables.py keeps the rows, report.py
writes tables and pictures from the rows.
"""
