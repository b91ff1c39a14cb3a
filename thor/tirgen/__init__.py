"""TIRGen's parts: drafts, the roles of actor and critic, the critic's contract, the filter, files and reports."""
