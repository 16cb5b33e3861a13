"""What each ATen operator becomes, one family a file; see specqd.codegen.general.table."""
