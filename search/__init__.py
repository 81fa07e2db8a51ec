"""From a study to a front, a report and files. The modules in the order in which data passes them:

the question   study_file, study, study_check, objectives, template, dryrun
the search     grammar, samplers, schedule, pareto, driver
the work       executors, worker, evaluate, measure, standalone
the run        records, store, journal, ledger, provenance, run
the outcome    front, effects, budget, winners, exports/
its pictures   outline, draw, picture, plotting, figures, figures_front, figures_effects
its pages      page, report, dashboard/
the commands   cli, commands_*, options, source, terminal, progress, units, doctor
"""
