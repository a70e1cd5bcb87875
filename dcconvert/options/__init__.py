"""Options of the commands: the layout of the help, and the options that several commands share."""
