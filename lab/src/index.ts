/** The plugin: a side panel with the project's status, and the command that shows it. */
import {
  ILabShell,
  ILayoutRestorer,
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { ICommandPalette } from '@jupyterlab/apputils';
import { ISettingRegistry } from '@jupyterlab/settingregistry';

import { StatusModel } from './model';
import { StatusPanel } from './panel';

const PLUGIN = 'mlops-nb:plugin';
const SHOW = 'mlops:show-status';
const REFRESH = 'mlops:refresh-status';

const plugin: JupyterFrontEndPlugin<void> = {
  id: PLUGIN,
  description: 'The status of an mlops_nb project in the left side bar.',
  autoStart: true,
  optional: [ICommandPalette, ILabShell, ILayoutRestorer, ISettingRegistry],
  activate
};

function activate(
  app: JupyterFrontEnd,
  palette: ICommandPalette | null,
  shell: ILabShell | null,
  restorer: ILayoutRestorer | null,
  settings: ISettingRegistry | null
): void {
  const model = new StatusModel(app.serviceManager.serverSettings);
  const panel = new StatusPanel(model);

  app.commands.addCommand(SHOW, {
    label: 'MLOps: show status',
    caption: 'Show data, models, runs, deployments and alerts of the project',
    describedBy: { args: { type: 'object', properties: {} } },
    execute: () => {
      app.shell.activateById(panel.id);
    }
  });
  app.commands.addCommand(REFRESH, {
    label: 'MLOps: refresh status',
    caption: 'Ask the server for the status of the project again',
    describedBy: { args: { type: 'object', properties: {} } },
    execute: () => model.refresh()
  });
  for (const command of [SHOW, REFRESH]) {
    palette?.addItem({ command, category: 'MLOps' });
  }

  app.shell.add(panel, 'left', { rank: 350, type: 'MLOps' });
  if (shell) {
    restorer?.add(panel, panel.id);
  }
  void followSettings(settings, model);
}

/** Take the project's folder from the user's settings, now and whenever they change. */
async function followSettings(
  registry: ISettingRegistry | null,
  model: StatusModel
): Promise<void> {
  try {
    const settings = await registry?.load(PLUGIN);
    const apply = () => {
      model.folder = (settings?.get('folder').composite as string) ?? '';
    };
    apply();
    settings?.changed.connect(apply);
  } catch (error) {
    console.error('The settings of mlops-nb cannot be read.', error);
  }
}

export default plugin;
