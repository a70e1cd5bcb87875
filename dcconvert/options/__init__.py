"""What the commands of the command line share: how help is laid out, and the options that several of them have."""
