"""How do several runs stand beside each other?

    directories     run directories, by name
    records         the state, numbers and settings of each run
    frontier        the SAEs that no other one beats
    page            the page of several runs
    service         its routes, and the process that serves them

It reads run directories as the monitor of one run does, with its modules, and evaluates nothing. Imported by
`cli.serve`.
"""
